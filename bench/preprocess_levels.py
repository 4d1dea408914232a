"""What uint8 into the tower would save: the passes over float32 images that it would leave out.

    python -m bench.preprocess levels

Normalisation folded into the patch embedding would let images stay uint8 until then. Nothing else
changes: the product is the same, on folded weights. So its gain is at most that of three passes:
the resize writes bytes, a batch is a quarter as long, and patches become rows by a pass that reads
bytes; for the scheme int8-patches they become rows of int8 without being quantized. CPU time of one
thread, the least of several runs, per photo.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, cast

import numpy as np
import torch
import typer
from torch import Tensor

import lraee
from bench.environment import describe
from lraee.data.preprocess import from_transform
from lraee.data.resize import resize
from lraee.measurement.timing import ImageEncoder
from lraee.ops.backend import operators
from lraee.zoo.opening import open_model

BATCH = 32


def least_ms(call: Callable[[], object], runs: int) -> float:
    """CPU milliseconds of this process."""
    least = float("inf")
    for _ in range(runs):
        start = time.process_time_ns()
        call()
        least = min(least, time.process_time_ns() - start)
    return least / 1e6


def rows_of(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Patches as rows [B * N, 3 * patch * patch], in one pass that converts them."""
    B, C, side, _ = images.shape
    N = side // patch
    patches = images.view(B, C, N, patch, N, patch).permute(0, 2, 4, 1, 3, 5)
    rows = torch.empty(patches.shape, dtype=dtype)
    return rows.copy_(patches).view(B * N * N, -1)


def levels(
    model: Annotated[str, typer.Option(help="Of open_clip; random weights.")] = "ViT-B-32",
    patch: Annotated[int, typer.Option(min=1, help="Its side.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="The least of so many counts.")] = 30,
) -> None:
    """Milliseconds a photo of each pass on float32 and on uint8, beside those of the tower."""
    torch.set_num_threads(1)
    typer.echo("  ".join(f"{key} {value}" for key, value in describe().items()))
    torch.manual_seed(0)
    opened = open_model(model, may_be_random=True)
    preprocess = from_transform(opened.preprocess, mode="fast")
    side = max(preprocess.size)
    picture = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    top, left = 0, (round(side * 500 / 375) - side) // 2
    table = torch.from_numpy(preprocess.table)
    both = {
        name: (lambda with_table=with_table: resize(
            picture, size=(side, round(side * 500 / 375)), crop=(top, left, side, side),
            filter="bicubic", table=with_table,
        ))
        for name, with_table in (("float32", table), ("uint8", None))
    }  # fmt: skip
    photos = {name: [call().numpy() for _ in range(BATCH)] for name, call in both.items()}
    batches = {name: torch.from_numpy(np.stack(rows)) for name, rows in photos.items()}
    quantize = operators("auto").quantize_rows
    steps: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "resize, 500 x 375": (both["float32"], both["uint8"], 1),
        "batch": (
            lambda: np.stack(photos["float32"]), lambda: np.stack(photos["uint8"]), BATCH,
        ),
        "int8: rows": (
            lambda: rows_of(batches["float32"], patch, torch.float32),
            lambda: rows_of(batches["uint8"], patch, torch.float32), BATCH,
        ),
        "int8-patches: rows": (
            lambda: quantize(rows_of(batches["float32"], patch, torch.float32), symmetric=False),
            lambda: rows_of(batches["uint8"], patch, torch.uint8) ^ 128, BATCH,
        ),
    }  # fmt: skip
    saved = {}
    for name, (today, folded, count) in steps.items():
        before, after = (least_ms(call, runs) / count for call in (today, folded))
        saved[name] = before - after
        typer.echo(f"  {name:<20} float32 {before:.3f} ms  uint8 {after:.3f} ms")
    shared = saved["resize, 500 x 375"] + saved["batch"]
    for scheme in ("int8", "int8-patches"):
        fast = cast(ImageEncoder, lraee.accelerate(opened.model, scheme=scheme))
        with torch.inference_mode():
            tower = least_ms(partial(fast.encode_image, batches["float32"]), 5) / BATCH
        gain = shared + saved[f"{scheme}: rows"]
        typer.echo(
            f"  {scheme:<12} tower {tower:.2f} ms; uint8 would save {gain:.3f} ms,"
            f" {100 * gain / tower:.1f} % of it"
        )
