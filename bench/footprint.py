"""Memory of a process that serves images in float32 or in INT8, and the seconds until it can.

    python -m bench.footprint --tower ViT-B-32

Each form runs in a process of its own, with random weights: it opens the model, makes it ready,
lets go of the text tower, as a server of images does, and encodes batches. Peak memory is what the
system counted for the process (ru_maxrss), that of the imports included; `after` is what it holds
in the end. `int8` is accelerate(inplace=True), `int8 from file` is lraee.load, which needs the
float model to put the blocks in.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from torch import nn

import lraee
from bench.environment import describe
from lraee import towers
from lraee.models import open_model

FORMS = ("float32", "int8", "int8-patches", "int8 from file")
MEGABYTE = 2.0**20


def ready(form: str, tower: str, saved: Path) -> tuple[nn.Module, float]:
    """The image tower in this form, and the seconds from the open float model to it."""
    model = open_model(tower, may_be_random=True).model
    make: dict[str, Callable[[], nn.Module]] = {
        "float32": lambda: model,
        "int8": lambda: lraee.accelerate(model, inplace=True),
        "int8-patches": lambda: lraee.accelerate(model, scheme="int8-patches", inplace=True),
        "int8 from file": lambda: lraee.load(saved, model),
    }
    start = time.perf_counter()
    made = make[form]()
    return towers.find_tower(made), time.perf_counter() - start


def measure(form: str, tower: str, batch: int, saved: Path) -> dict[str, float]:
    """What this process takes for a form; run it in a process of its own."""
    visual, seconds = ready(form, tower, saved)
    size = cast(tuple[int, int], visual.image_size)
    with torch.inference_mode():
        for _ in range(3):
            visual(torch.zeros(batch, 3, *size))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status").read_text()
    held = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return {
        "ready_s": seconds,
        "peak_mb": peak / MEGABYTE,
        "after_mb": int(held.split()[1]) * 1024 / MEGABYTE,
        "weights_mb": sum(t.nbytes for t in visual.state_dict().values()) / MEGABYTE,
    }


def in_its_own_process(form: str, tower: str, batch: int, saved: Path) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    words = [sys.executable, "-m", "bench.footprint", "--tower", tower, "--batch", str(batch)]
    ran = subprocess.run(
        [*words, "--only", form, "--saved", str(saved)], check=True, capture_output=True, text=True
    )
    return cast(dict[str, float], json.loads(ran.stdout.splitlines()[-1]))


def save_int8(tower: str, folder: Path) -> None:
    """What `int8 from file` reads."""
    lraee.save(lraee.accelerate(open_model(tower, may_be_random=True).model), folder)


def main(
    tower: str = "ViT-B-32",
    batch: int = 32,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    saved: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print one line per form."""
    if only is not None and saved is not None:
        typer.echo(json.dumps(measure(only, tower, batch, saved)))
        return
    for key, value in describe().items():
        typer.echo(f"{key:<10} {value}")
    typer.echo(f"\n{tower}, batches of {batch}")
    typer.echo(f"{'':<15} {'ready, s':>9} {'peak, MB':>9} {'after, MB':>10} {'weights, MB':>12}")
    with tempfile.TemporaryDirectory() as folder:
        save_int8(tower, Path(folder))
        for form in FORMS:
            found = in_its_own_process(form, tower, batch, Path(folder))
            typer.echo(
                f"{form:<15} {found['ready_s']:9.2f} {found['peak_mb']:9.0f}"
                f" {found['after_mb']:10.0f} {found['weights_mb']:12.0f}"
            )


if __name__ == "__main__":
    typer.run(main)
