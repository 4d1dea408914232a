"""Memory that lraee.calibrate takes, by the number of photos; 2 GB at 20,000 is the aim.

    python -m bench.calibrate_memory TRAIN.zip --count 2000 --count 20000

Each count runs in a process of its own. `held` is the largest anonymous memory that the process
had, the libraries and both models included: pages of the files in which large features lie are the
system's to drop, and count in `peak` (Linux's VmHWM) alone. Heads are trained for few steps, which
changes no memory.
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import lraee
from bench.environment import describe
from bench.footprint import MEGABYTE, _of_status
from lraee.calibration.pipeline import BEST
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.towers.calls import embedding_size
from lraee.towers.families import find_tower
from lraee.zoo.opening import open_model

STEPS, CLASSES = 20, 200
_EVERY = 0.02


class Watcher:
    """The largest anonymous memory of this process while the block runs, in bytes."""

    def __init__(self) -> None:
        self.most, self._is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._is_over.wait(_EVERY):
            self.most = max(self.most, _of_status("RssAnon"))

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def measure(photos: Path, tower: str, count: int) -> dict[str, float]:
    """What one calibration takes; run it in a process of its own, on Linux."""
    opened = open_model(tower, may_be_random=True)
    fast = lraee.accelerate(opened.model)
    before, start = _of_status("RssAnon"), time.perf_counter()
    texts = torch.randn(CLASSES, embedding_size(find_tower(fast)))
    recipe = replace(BEST, head=replace(BEST.head, steps=STEPS))
    with Watcher() as watcher:
        images = PhotoImages(Photos(photos, limit=count), opened.with_margin, progress=False)
        lraee.calibrate(fast, images, classes=texts, recipe=recipe, is_timed=False, progress=False)
    return {
        "photos": len(images.names), "before_mb": before / MEGABYTE,
        "held_mb": watcher.most / MEGABYTE, "peak_mb": _of_status("VmHWM") / MEGABYTE,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main(
    photos: Path,
    tower: str = "lraee-tiny",
    count: Annotated[list[int] | None, typer.Option(help="photos; may be given often")] = None,
    only: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print one line per count."""
    if only is not None:
        typer.echo(json.dumps(measure(photos, tower, only)))
        return
    for key, value in describe().items():
        typer.echo(f"{key:<10} {value}")
    typer.echo(f"\n{tower}; MB\n{'photos':>8} {'before':>8} {'held':>8} {'peak':>8} {'seconds':>8}")
    for each in count or [2000, 20000]:
        words = [sys.executable, "-m", "bench.calibrate_memory", str(photos), "--tower", tower]
        ran = subprocess.run(
            [*words, "--only", str(each)], check=True, stdout=subprocess.PIPE, text=True
        )
        row = json.loads(ran.stdout.splitlines()[-1])
        typer.echo(
            f"{row['photos']:8.0f} {row['before_mb']:8.0f} {row['held_mb']:8.0f}"
            f" {row['peak_mb']:8.0f} {row['seconds']:8.0f}"
        )


if __name__ == "__main__":
    typer.run(main)
