"""Runs a float tower and its int8 form over images, and collects what calibration learns from."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lraee.calibration.head_training import augmented, centred
from lraee.calibration.noise import BlockNoise, NoiseMeter
from lraee.exits.head import HeadWeights, Int8Head, contrasts, pool, probe_tokens
from lraee.model.trace import full_depth
from lraee.ops.reference import Probe
from lraee.towers.families import (
    block_specs,
    blocks_of,
    device_of,
    encode,
    find_tower,
    tower_spec,
)

_log = logging.getLogger("lraee")

Images = Tensor | Iterable[Tensor]
"""Preprocessed images [n, 3, H, W], or their batches: any iterable that starts anew each time and
gives the same images in the same order. They may be larger than what the tower takes."""

MIN_IMAGES = 100

_KINDS = "float [n, 3, H, W], or an iterable of such batches that starts anew each time"


class FeatureSource(Protocol):
    """What calibration learns from: a float model and its int8 form, run over images."""

    @property
    def fast(self) -> nn.Module:
        """The accelerated model."""

    @property
    def progress(self) -> bool:
        """Whether to show bars."""

    def embeddings(self) -> dict[str, Tensor]:
        """See Pair."""

    def noise(self, most: int) -> list[BlockNoise]:
        """See Pair."""

    def pooled(
        self, blocks: Sequence[int], rows: Tensor, *, view_seed: int | None
    ) -> dict[str, Tensor]:
        """See Pair."""

    def probed(
        self,
        heads: Mapping[int, HeadWeights],
        rows: Tensor,
        *,
        classes: Tensor,
        logit_scale: float,
    ) -> dict[str, Tensor]:
        """See Pair."""


class Pair:
    """A float model, its int8 form, and the images to run both on.

    Args:
      teacher: the float model.
      fast: the accelerated one; runs at full depth here, whatever exits it has.
      images: see Images.
      batch: images per call where `images` is one tensor.
      progress: show a bar per pass.
    Raises: TypeError on images of another kind; so does each pass over them, and ValueError where
      it does not meet the images of the pass before.
    """

    def __init__(
        self, teacher: nn.Module, fast: nn.Module, images: Images, *, batch: int, progress: bool
    ) -> None:
        """See the class."""
        self.teacher, self.fast = teacher, fast
        spec = tower_spec(find_tower(fast))
        self.size, self.prefix_tokens = spec.image_size, spec.prefix_tokens
        self._images, self._batch, self.progress = images, batch, progress
        self._checksums: list[int] = []
        if not isinstance(images, Iterable) or isinstance(images, Iterator):
            raise TypeError(
                f"calibrate: images must be {_KINDS}; each pass goes through them from the start,"
                f" got {type(images).__name__}"
            )

    def batches(self, description: str) -> Iterator[Tensor]:
        """The images [B, 3, H, W], in order."""
        images = self._images
        parts = torch.split(images, self._batch) if isinstance(images, Tensor) else images
        bar = tqdm(parts, desc=description, disable=not self.progress, leave=False)
        start = 0
        for part in bar:
            _require_images(part, self.size)
            if not len(part):
                continue
            self._require_same(start, part)
            start += len(part)
            yield part

    def _require_same(self, start: int, part: Tensor) -> None:
        """Raises ValueError if images start, start + 1, … differ from those of an earlier pass."""
        if isinstance(self._images, Tensor):
            return
        for place, image in enumerate(part, start):
            checksum = crc32(image.detach().contiguous().cpu().view(torch.uint8).numpy())
            if place == len(self._checksums):
                self._checksums.append(checksum)
            elif self._checksums[place] != checksum:
                raise ValueError(
                    "calibrate: images must come in the same order in each pass, got another one at"
                    f" place {place}; does their loader shuffle?"
                )

    @torch.inference_mode()
    def embeddings(self) -> dict[str, Tensor]:
        """`teacher` and `full`, float32 [n, E]: centre crops at full depth in float and in int8."""
        teacher, full = [], []
        with full_depth(self.fast):
            for images in self.batches("full depth"):
                x = centred(images, self.size)
                teacher.append(encode(self.teacher, x))
                full.append(encode(self.fast, x))
        if not teacher:
            raise ValueError("calibrate: images must be one at least, got none")
        return {"teacher": torch.cat(teacher), "full": torch.cat(full)}

    @torch.inference_mode()
    def noise(self, most: int) -> list[BlockNoise]:
        """The noise profile over the first images, `most` of them."""
        tower, fast_tower = find_tower(self.teacher), find_tower(self.fast)
        meter = NoiseMeter(len(blocks_of(tower)))
        remaining = most
        with full_depth(self.fast), tapped(tower) as z, tapped(fast_tower) as z_int8:
            for images in self.batches("noise"):
                x = centred(images[:remaining], self.size)
                encode(self.teacher, x)
                encode(self.fast, x)
                meter.add(z[0], z[1:], z_int8[1:])
                remaining -= len(x)
                if remaining <= 0:
                    break
        return meter.result()

    @torch.inference_mode()
    def pooled(
        self, blocks: Sequence[int], rows: Tensor, *, view_seed: int | None
    ) -> dict[str, Tensor]:
        """Inputs of heads on the images that `rows` marks, and the float tower's embeddings.

        Args:
          blocks: depths to pool at.
          rows: bool [n].
          view_seed: of the random crops; None takes centre crops.
        Returns: `pooled` float16 [images, len(blocks), 2 D], mean and class token, or whatever
          stands in its place where the tower has none; `teacher` float32 [images, E].
        """
        source = None if view_seed is None else torch.Generator().manual_seed(view_seed)
        pooled, teacher = [], []
        with full_depth(self.fast), tapped(find_tower(self.fast)) as z:
            for images in self._marked(rows, "crops" if source else "heads"):
                if source is None:
                    x = centred(images, self.size)
                else:
                    x = augmented(images, size=self.size, generator=source)
                teacher.append(encode(self.teacher, x))
                encode(self.fast, x)
                inputs = [
                    pool(self._probe_tokens(z[block]), has_class_token=True) for block in blocks
                ]
                pooled.append(torch.stack(inputs, dim=1).half().cpu())
        return {"pooled": torch.cat(pooled), "teacher": torch.cat(teacher)}

    @torch.inference_mode()
    def probed(
        self,
        heads: Mapping[int, HeadWeights],
        rows: Tensor,
        *,
        classes: Tensor,
        logit_scale: float,
    ) -> dict[str, Tensor]:
        """What the int8 probe of each head measures on the centre crops that `rows` marks.

        Returns: over images and heads, `embedding` float32 [n, m, E], `top1` int64 [n, m] and
          `features` float32 [n, m, 3]: confidence, margin, variance.
        """
        device = device_of(self.fast)
        gate = torch.zeros(4)
        modules = {block: Int8Head(head, gate).to(device) for block, head in heads.items()}
        classes = contrasts(classes).to(device)
        with full_depth(self.fast), tapped(find_tower(self.fast)) as z:

            def batches() -> Iterator[list[Probe]]:
                for images in self._marked(rows, "probes"):
                    encode(self.fast, centred(images, self.size))
                    yield [
                        head(self._probe_tokens(z[block]), classes, logit_scale)
                        for block, head in modules.items()
                    ]

            return joined(batches())

    @torch.inference_mode()
    def tokens(self, rows: Tensor, description: str) -> Iterator[list[Tensor]]:
        """Of each batch of the centre crops that `rows` marks, the int8 tower's tokens [B, L, D]:
        before the first block, then after each.
        """
        with full_depth(self.fast), tapped(find_tower(self.fast)) as z:
            for images in self._marked(rows, description):
                encode(self.fast, centred(images, self.size))
                yield z

    def marked(self, rows: Tensor) -> "Pair":
        """The same models on the images that `rows` marks, bool [n], in memory."""
        some = torch.cat(list(self._marked(rows, "images")))
        return Pair(self.teacher, self.fast, some, batch=self._batch, progress=self.progress)

    def _probe_tokens(self, z: Tensor) -> Tensor:
        return probe_tokens(z, self.prefix_tokens)

    def _marked(self, rows: Tensor, description: str) -> Iterator[Tensor]:
        start = 0
        for images in self.batches(description):
            chosen = images[rows[start : start + len(images)]]
            start += len(images)
            if len(chosen):
                yield chosen
        if start != len(rows):
            raise ValueError(
                f"calibrate: images must be the same in each pass, got {start} after {len(rows)}"
            )


def split_images(
    embeddings: Mapping[str, Tensor], *, shares: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Name -> which images, bool [n]; images that are not finite are in no split.

    Args:
      embeddings: from FeatureSource.embeddings, [n, E] each.
      shares: of the images, by name, as pipeline.SPLITS.
      seed: of the order in which images are dealt out.
    Raises: ValueError on fewer than MIN_IMAGES finite images.
    """
    whole = torch.cat([embeddings["teacher"], embeddings["full"]], dim=1)
    usable = whole.isfinite().all(1).nonzero()[:, 0]
    n = len(usable)
    if n < len(whole):
        _log.warning("calibrate: %d of %d images are not finite", len(whole) - n, len(whole))
    if n < MIN_IMAGES:
        raise ValueError(f"calibrate: images must be at least {MIN_IMAGES}, got {n}")
    source = torch.Generator().manual_seed(seed)
    order = usable[torch.randperm(n, generator=source)]
    masks, start = {}, 0
    for name, share in shares.items():
        stop = n if name == "thresholds" else start + round(share * n)
        masks[name] = torch.zeros(len(whole), dtype=torch.bool)
        masks[name][order[start:stop]] = True
        start = stop
    return masks


@contextmanager
def tapped(tower: nn.Module) -> Iterator[list[Tensor]]:
    """The tokens [B, L, D] of the tower's last call: before the first block, then after each."""
    blocks = blocks_of(tower)
    z: list[Tensor] = [torch.empty(0)] * (len(blocks) + 1)
    calls = [spec.call for spec in block_specs(tower)]

    def put(place: int, tokens: Tensor) -> None:
        z[place] = tokens

    def put_first(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        put(0, calls[0].tokens(args, named))

    handles = [blocks[0].register_forward_pre_hook(put_first, with_kwargs=True)]
    for place, (block, call) in enumerate(zip(blocks, calls, strict=True), 1):
        handles.append(
            block.register_forward_hook(
                lambda _, args, y, place=place, call=call: put(place, call.unwrap(y))
            )
        )
    try:
        yield z
    finally:
        for handle in handles:
            handle.remove()


def _require_images(part: object, size: tuple[int, int]) -> None:
    """Raises TypeError on anything but a batch of images, ValueError on images that are smaller."""
    if not isinstance(part, Tensor):
        raise TypeError(f"calibrate: images must be {_KINDS}, got {type(part).__name__}")
    if part.dim() != 4 or not part.is_floating_point():
        got = f"{part.dtype} {list(part.shape)}"
        raise TypeError(f"calibrate: images must be {_KINDS}, got {got}")
    H, W = part.shape[2:]
    if H < size[0] or W < size[1]:
        raise ValueError(f"calibrate: images must be at least {size[0]} x {size[1]}, got {H} x {W}")


def joined(batches: Iterable[Sequence[Probe]]) -> dict[str, Tensor]:
    """The probes of m heads, batch by batch, as Pair.probed gives them, on the CPU."""
    parts: dict[str, list[Tensor]] = {"embedding": [], "top1": [], "features": []}
    for probes in batches:
        parts["embedding"].append(torch.stack([p[0] for p in probes], 1).cpu())
        parts["top1"].append(torch.stack([p[1] for p in probes], 1).cpu())
        parts["features"].append(torch.stack([torch.stack(p[2:5], 1) for p in probes], 1).cpu())
    return {name: torch.cat(each) for name, each in parts.items()}
