"""Steps about the machine: what it is, what it can do at most, what compiles and passes there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import torch

from bench.gpu_sweep.run import Context, Item, Step, Values, timed
from lraee.diagnostics.selftest import describe
from lraee.measurement import machine

TIMEOUT_S = 150.0
TAIL_CHARS = 2000


def versions(context: Context) -> Iterator[Item]:
    """What everything is measured on."""

    def run() -> Mapping[str, Values]:
        clocks = _output(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit",
                          "--format=csv,noheader"])  # fmt: skip
        return {"": {**machine.describe(), **describe(context.target), "clocks": clocks}}

    yield Item("", run)


def _output(command: Sequence[str]) -> str:
    """What a program says, or that it is not there."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.strip()[:500]


def ceilings(context: Context) -> Iterator[Item]:
    """Copy, a read of what lies in L2, and products of 8192^3 in float16 and int8."""
    device, size = context.target.device, 64 if context.is_dry else 8192
    copied, in_l2 = (1 << 12, 1 << 10) if context.is_dry else (1 << 30, 16 << 20)

    def bandwidth(count: int, moved: int, call: object) -> Mapping[str, Values]:
        (line,) = timed(context, {"": call}).values()  # type: ignore[dict-item]
        return {"": {**line, "gb_s": round(moved * count / line["us"] / 1e3, 1)}}

    def copy() -> Mapping[str, Values]:
        x = torch.zeros(copied, dtype=torch.int8, device=device)
        y = torch.empty_like(x)
        return bandwidth(copied, 2, partial(y.copy_, x))

    def read() -> Mapping[str, Values]:
        x = torch.zeros(in_l2 // 4, dtype=torch.float32, device=device)
        return bandwidth(in_l2, 1, x.sum)

    def product(dtype: torch.dtype) -> Mapping[str, Values]:
        x = torch.ones(size, size, device=device).to(dtype)
        call = partial(torch._int_mm, x, x.t()) if dtype == torch.int8 else partial(x.mm, x.t())
        (line,) = timed(context, {"": call}).values()
        return {"": {**line, "tops": round(2 * size**3 / line["us"] / 1e6, 1)}}

    yield Item("copy", copy)
    yield Item("read from L2", read)
    yield Item(f"float16 {size}", partial(product, torch.float16))
    yield Item(f"int8 {size}", partial(product, torch.int8))


@dataclass(frozen=True)
class Program:
    """A program that runs beside the compiling: its arguments with a GPU, and without."""

    name: str
    arguments: tuple[str, ...]
    dry: tuple[str, ...]


PROGRAMS = (
    Program("selftest", ("-m", "lraee", "selftest", "--quick", "--no-progress"),
            ("-m", "lraee", "doctor")),
    Program("gpu tests", ("-m", "pytest", "-q", "-m", "gpu", "tests"),
            ("-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/kernels/test_gpu.py")),
)  # fmt: skip


def programs(context: Context) -> Iterator[Item]:
    """Every variant compiled by processes of their own, the package's own tests beside them."""

    def run() -> Mapping[str, Values]:
        plain = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
        shards = [
            ["-m", "bench.gpu_sweep.compile_variants", "--shard", f"{i}/{context.workers}",
             *(["--dry"] if context.is_dry else [])]
            for i in range(context.workers)
        ]  # fmt: skip
        others = [one.dry if context.is_dry else one.arguments for one in PROGRAMS]
        of_tests = dict(os.environ) if context.is_dry else plain | {"TRITON_INTERPRET": "0"}
        start = time.monotonic()
        children = [_start(arguments, plain) for arguments in shards]
        tests = [_start(arguments, of_tests) for arguments in others]
        lines = {one.name: _ended(child, start) for one, child in zip(PROGRAMS, tests, strict=True)}
        compiled = [_ended(child, start) for child in children]
        wrong = [line for line in compiled if "error" in line]
        count = sum(_count(str(line["tail"])) for line in compiled)
        line: dict[str, object] = {"compiled": count, "failing": len(wrong)}
        if wrong:
            line["error"] = str(wrong[0]["error"])
        return {**lines, "compile": line}

    yield Item("", run, ("compile", *(one.name for one in PROGRAMS)))


@dataclass(frozen=True)
class Child:
    """A process, and the file that it writes to: a pipe would fill and stop it."""

    process: "subprocess.Popen[bytes]"
    output: IO[bytes]


def _start(arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
    output = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, env=dict(environment)
    )
    return Child(process, output)


def _ended(child: Child, start: float) -> dict[str, object]:
    """How a program ended, and the end of what it wrote."""
    line: dict[str, object] = {}
    try:
        code = child.process.wait(timeout=max(1.0, start + TIMEOUT_S - time.monotonic()))
        if code:
            line["error"] = f"exit code {code}"
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
        line["error"] = f"no end within {TIMEOUT_S:g} s"
    with child.output as file:
        file.seek(0)
        line["tail"] = file.read().decode(errors="replace")[-TAIL_CHARS:]
    return {**line, "s": round(time.monotonic() - start, 1)}


def _count(tail: str) -> int:
    """Variants that a shard says it compiled."""
    try:
        return int(json.loads(tail.strip().splitlines()[-1])["compiled"])
    except (ValueError, IndexError, KeyError, TypeError):
        return 0


STEPS = (
    Step("versions", versions, 1.0),
    Step("ceilings", ceilings, 4.0),
    Step("programs", programs, 120.0),
)
