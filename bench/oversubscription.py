"""Time of a call while several processes share the cores, by how OpenMP's threads wait.

    python -m bench.oversubscription --processes 8 --threads 2 --model ViT-B-32 --batch 8 --rounds 3

In each round every setting, in rotating order, starts its processes anew (libgomp reads the
environment once, when torch is loaded), lets them warm up together, and has them all call
`encode_image` at once; then the same with one process alone. A time is the median over processes
and rounds; a ratio is the median of the ratios of each round, above 1 where the setting is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.environment import describe
from lraee.model.accelerate import accelerate
from lraee.towers.families import encode_image, image_size
from lraee.zoo.opening import open_model

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def work(model: str, pretrained: str | None, batch: int, calls: int) -> None:
    """One process: warm up, say so, wait for a line on stdin, print seconds a call."""
    opened = open_model(model, pretrained, may_be_random=True)
    fast = accelerate(opened.model, inplace=True)
    images = torch.randn(batch, 3, *image_size(fast))
    with torch.inference_mode():
        for _ in range(2):
            encode_image(fast, images)
        print("warm", flush=True)
        sys.stdin.readline()
        start = time.perf_counter()
        for _ in range(calls):
            encode_image(fast, images)
    print((time.perf_counter() - start) / calls, flush=True)


def at_once(arguments: list[str], environment: dict[str, str], processes: int) -> list[float]:
    """Seconds a call of each of so many processes."""
    command = [sys.executable, "-m", "bench.oversubscription", "--worker", *arguments]
    running = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    try:
        for each in running:
            assert each.stdout and each.stdout.readline().strip() == "warm"
        for each in running:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
        return [float(each.stdout.readline()) for each in running if each.stdout]
    finally:
        for each in running:
            each.kill()
            each.wait()


def measure(
    arguments: list[str], processes: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Median seconds a call in each round, by setting."""
    bare = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    order = list(SETTINGS)
    for _ in range(rounds):
        for name in order:
            environment = {**bare, "OMP_NUM_THREADS": str(threads), **SETTINGS[name]}
            seconds[name].append(statistics.median(at_once(arguments, environment, processes)))
        order.append(order.pop(0))
    return seconds


def main(
    model: str = "lraee-tiny",
    pretrained: str | None = None,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 2,
    batch: int = 8,
    calls: Annotated[int, typer.Option(min=1, help="Timed, of each process.")] = 5,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print milliseconds a call of each setting, alone and with the others, and their ratios."""
    if worker:
        return work(model, pretrained, batch, calls)
    header = describe()
    typer.echo("  ".join(f"{key} {value}" for key, value in header.items()))
    arguments = ["--model", model, "--batch", str(batch), "--calls", str(calls)]
    arguments += [] if pretrained is None else ["--pretrained", pretrained]
    rows: list[dict[str, Any]] = []
    for count in sorted({1, processes}):
        seconds = measure(arguments, count, threads, rounds)
        for name, each in seconds.items():
            ratio = statistics.median(
                base / each_s for base, each_s in zip(seconds["default"], each, strict=True)
            )
            row = {
                "processes": count, "setting": name, "ms": 1e3 * statistics.median(each),
                "low_ms": 1e3 * min(each), "high_ms": 1e3 * max(each), "ratio": ratio,
            }  # fmt: skip
            rows.append(row)
            typer.echo(
                f"{count} processes  {name:<24} {row['ms']:9.1f} ms a call"
                f"  ({row['low_ms']:.1f} to {row['high_ms']:.1f})  {ratio:5.2f} x"
            )
    if out is not None:
        result = {"schema": "lraee.oversubscription/1", **header, "rows": rows}
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
