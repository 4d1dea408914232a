"""Memory of a process that serves images in float32 or in INT8, and the seconds until it can.

    python -m bench.footprint --tower ViT-B-32

Each form runs in a process of its own, with random weights: it opens the model, makes it ready
(INT8 by accelerate(inplace=True)), lets go of the text tower, as a server of images does, and
encodes batches. Opening takes the float weights in every form and is the peak of the process;
`serving` is the peak from then on (nan where Linux does not let it start anew), `after` what the
process holds in the end, imports included.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from torch import nn

import lraee
from bench.environment import describe
from lraee.towers.families import find_tower, tower_spec
from lraee.zoo.opening import open_model

FORMS = ("float32", "int8", "int8-patches")
MEGABYTE = 2.0**20


def ready(form: str, tower: str) -> tuple[nn.Module, float]:
    """The image tower in this form, and the seconds from the open float model to it."""
    model = open_model(tower, may_be_random=True).model
    start = time.perf_counter()
    if form != "float32":
        lraee.accelerate(model, scheme=form, inplace=True)
    return find_tower(model), time.perf_counter() - start


def measure(form: str, tower: str, batch: int) -> dict[str, float]:
    """What this process takes for a form; run it in a process of its own, on Linux."""
    visual, seconds = ready(form, tower)
    opening = _of_status("VmHWM")
    starts_anew = _peak_starts_anew()
    size = tower_spec(visual).image_size
    with torch.inference_mode():
        for _ in range(3):
            visual(torch.zeros(batch, 3, *size))
    peak = _of_status("VmHWM")
    return {
        "ready_s": seconds,
        "peak_mb": max(opening, peak) / MEGABYTE,
        "serving_mb": peak / MEGABYTE if starts_anew else math.nan,
        "after_mb": _of_status("VmRSS") / MEGABYTE,
        "weights_mb": sum(t.nbytes for t in visual.state_dict().values()) / MEGABYTE,
    }


def _peak_starts_anew() -> bool:
    """Lets VmHWM start again at what the process holds now; False where the kernel has no such."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _of_status(name: str) -> int:
    """Bytes that Linux gives under this name."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(f"{name}:")).split()[1])


def in_its_own_process(form: str, tower: str, batch: int) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    words = [sys.executable, "-m", "bench.footprint", "--tower", tower, "--batch", str(batch)]
    ran = subprocess.run([*words, "--only", form], check=True, stdout=subprocess.PIPE, text=True)
    return cast(dict[str, float], json.loads(ran.stdout.splitlines()[-1]))


def main(
    tower: str = "ViT-B-32",
    batch: int = 32,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print one line per form."""
    if only is not None:
        typer.echo(json.dumps(measure(only, tower, batch)))
        return
    for key, value in describe().items():
        typer.echo(f"{key:<10} {value}")
    typer.echo(f"\n{tower}, batches of {batch}; seconds, MB")
    typer.echo(f"{'':<13} {'ready':>7} {'peak':>7} {'serving':>8} {'after':>7} {'weights':>8}")
    for form in FORMS:
        row = in_its_own_process(form, tower, batch)
        typer.echo(
            f"{form:<13} {row['ready_s']:7.2f} {row['peak_mb']:7.0f} {row['serving_mb']:8.0f}"
            f" {row['after_mb']:7.0f} {row['weights_mb']:8.0f}"
        )


if __name__ == "__main__":
    typer.run(main)
