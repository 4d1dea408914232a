"""What calibration runs on: the images, checked, and what it may take of memory."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lraee.quantization.streams import SAMPLE_ROWS
from lraee.towers.families import as_input, tower_spec
from lraee.towers.runner import RowwiseTower

Images = Tensor | Iterable[Tensor]

MIN_IMAGES, MAX_IMAGES = 64, 256
_KINDS = "float [n, 3, H, W], or an iterable of such batches"
_EMBED = 8
_CHUNKS = 8
"""Least chunks that the images are cut into: odd and even ones judge each other."""


@dataclass(frozen=True)
class Calibration:
    """Images for `accelerate(model, calibration=…)`, with options.

    Args:
      images: preprocessed, 64 to 256 of them, float [n, 3, H, W] or an iterable of such batches;
        larger than the tower's input: their centre is taken. No labels.
      memory_mb: most that calibration may take beside the model and the images.
      folder: keeps finished blocks, so that a run cut off goes on there; removed at the end.
      progress: show a bar.
    """

    images: Images
    memory_mb: int = 4096
    folder: str | os.PathLike[str] | None = None
    progress: bool = True

    @staticmethod
    def of(given: Any) -> "Calibration":
        """Itself, or that of these images."""
        return given if isinstance(given, Calibration) else Calibration(given)


def read_tokens(fast: RowwiseTower, images: Images) -> tuple[Tensor, str]:
    """Tokens float32 [n, L, D] of the images before the first block, on the CPU, and their hash.

    Raises: TypeError, ValueError on images that cannot be used, in one line.
    """
    size = tower_spec(fast).image_size
    digest = hashlib.sha256()
    parts: list[Tensor] = []
    count = 0
    for batch in _batches(images):
        _require_images(batch, size)
        batch = _centre(batch, size)
        count += len(batch)
        _require_count(count, at_end=False)
        digest.update(batch.detach().float().contiguous().cpu().numpy().tobytes())
        for part in torch.split(batch, _EMBED) if len(batch) else ():
            parts.append(fast.embed(as_input(fast, part)).float().cpu())
    _require_count(count, at_end=True)
    return torch.cat(parts), digest.hexdigest()


def _batches(images: Images) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        yield images
        return
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | dict):
        raise TypeError(f"accelerate: calibration must be {_KINDS}, got {type(images).__name__}")
    yield from images


def _require_images(batch: object, size: tuple[int, int]) -> None:
    if isinstance(batch, tuple | list):
        raise TypeError(
            f"accelerate: calibration must be {_KINDS}, got a {type(batch).__name__} of"
            f" {len(batch)}; calibration takes no labels, give the images alone"
        )
    if not isinstance(batch, Tensor):
        raise TypeError(f"accelerate: calibration must be {_KINDS}, got {type(batch).__name__}")
    if batch.dim() != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        got = f"{batch.dtype} {list(batch.shape)}"
        raise TypeError(f"accelerate: calibration must be {_KINDS}, got {got}")
    H, W = batch.shape[2:]
    if H < size[0] or W < size[1]:
        raise ValueError(
            f"accelerate: calibration images must be at least {size[0]} x {size[1]}, got {H} x {W};"
            " preprocess them as for encode_image"
        )
    if not torch.isfinite(batch).all():
        raise ValueError(
            "accelerate: calibration images must be finite, got NaN or Inf; leave such images out"
        )


def _centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (images.shape[2] - size[0]) // 2, (images.shape[3] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def _require_count(count: int, *, at_end: bool) -> None:
    if count > MAX_IMAGES or (at_end and count < MIN_IMAGES):
        got = f"{count}" if at_end else f"{count} or more"
        raise ValueError(
            f"accelerate: calibration images must be {MIN_IMAGES} to {MAX_IMAGES}, got {got}; give"
            " 128 that are like those to be embedded"
        )


def chunk_of(n: int, L: int, *, width: int, widest: int, products: int, memory_mb: int) -> int:
    """How many images a layer runs on at once, so that all stays within the limit.

    Args:
      n, L: images, and tokens of each.
      width: D.
      widest: most inputs or outputs of a linear.
      products: bytes that the sums and factors of the largest linear take.
      memory_mb: the limit.
    Raises: ValueError where the images that scales are searched on would not fit.
    """
    streams = 4 * n * L * width * 4
    one = L * 4 * (4 * widest + 8 * width)
    sample = min(n, -(-SAMPLE_ROWS // L))
    left = memory_mb * (1 << 20) - streams - products
    if left < sample * one:
        least = -(-(streams + products + sample * one) >> 20)
        raise ValueError(
            f"accelerate: calibration memory_mb must be at least {least} for {n} images of this"
            f" tower, got {memory_mb}; raise it or give fewer images"
        )
    return max(1, min(max(_EMBED, sample), n // _CHUNKS, left // one))
