"""Whole towers: where their time goes, how long they take beside torch, and what an exit adds."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import lraee
from bench.exit_time import random_exits
from bench.gpu_sweep.run import Context, Item, Step, Values
from lraee.diagnostics.selftest_timing import captured, cuda_interleaved
from lraee.measurement.timing import Timing, timed_rounds
from lraee.towers.families import image_size
from lraee.zoo.opening import open_model

NAMES = ("ViT-B-16", "ViT-L-14", "ViT-B-32")
BATCHES = (32, 128, 8, 1)
EXIT_AFTER = {8: 0.1}
"""One exit after so many of 12 blocks; the share is not used: no image exits."""
NCU_KERNELS = 10
NCU_TIMEOUT_S = 60


def names(context: Context) -> tuple[str, ...]:
    """Towers, those with many tokens first; weights are random."""
    return ("lraee-tiny",) if context.is_dry else NAMES


def batches(context: Context) -> tuple[int, ...]:
    """Images of a call."""
    return (1,) if context.is_dry else BATCHES


def float_tower(context: Context, name: str) -> Any:
    """In float16 on the GPU; in float32 where there is none."""
    visual = open_model(name, may_be_random=True).model.get_submodule("visual").eval()
    dtype = torch.float32 if context.is_dry else torch.float16
    return copy.deepcopy(visual).to(context.target.device, dtype)


def images(context: Context, tower: nn.Module, batch: int) -> torch.Tensor:
    """Random ones of the tower's type."""
    dtype = next(tower.parameters()).dtype
    x = torch.randn(batch, 3, *image_size(tower), device=context.target.device)
    return x.to(torch.float32 if context.is_dry else dtype)


def as_called(
    context: Context, calls: Mapping[str, Callable[[], object]], budget_s: float = 1.0
) -> dict[str, list[float]]:
    """Seconds of calls as a user makes them, in turn."""
    if context.is_dry:
        return timed_rounds(calls, 1)
    return cuda_interleaved(calls, context.target.device, budget_s=budget_s)


def lines_of(seconds: Mapping[str, list[float]]) -> dict[str, Values]:
    """Milliseconds of each."""
    timings = {name: Timing.of(each) for name, each in seconds.items()}
    return {
        name: {"ms": round(t.median_ms, 4), "p20_ms": round(t.p20_ms, 4),
               "p80_ms": round(t.p80_ms, 4)}
        for name, t in timings.items()
    }  # fmt: skip


def profiles(context: Context) -> Iterator[Item]:
    """Microseconds of each kernel in one call of a tower, and what ncu counts where it is there."""
    for name in names(context)[:2]:
        batch = batches(context)[0]
        yield Item(f"{name} batch {batch}", partial(_profile, context, name, batch))
    yield Item(f"ncu {names(context)[0]}", partial(_ncu, context, names(context)[0]))


@torch.inference_mode()
def _profile(context: Context, name: str, batch: int) -> Mapping[str, Values]:
    fast: Any = lraee.accelerate(float_tower(context, name))
    fast.cuda_graphs = False
    x = images(context, fast, batch)
    fast(x)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if not context.is_dry:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        fast(x)
    rows = []
    for event in profile.key_averages():
        us = event.self_cpu_time_total if context.is_dry else event.self_device_time_total
        if us > 0:
            rows.append([event.key[:120], int(event.count), round(float(us), 1)])
    rows.sort(key=lambda row: -float(row[2]))
    return {"": {"kernels": rows[:40], "us": round(sum(float(row[2]) for row in rows), 1)}}


def _ncu(context: Context, name: str) -> Mapping[str, Values]:
    """What ncu says of the first kernels of a call, in a process of its own."""
    program = shutil.which("ncu")
    if program is None:
        return {"": {"absent": "no ncu"}}
    command = [
        program, "--clock-control", "none", "--csv", "--launch-skip", "20", "--launch-count",
        str(NCU_KERNELS), sys.executable, "-m", "bench.gpu_tower", "--tower", name, "--batch",
        "32", "--budget-s", "0.1",
    ]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=NCU_TIMEOUT_S, env=os.environ, check=False
    )
    if result.returncode:
        return {"": {"absent": result.stderr.strip()[-200:] or "ncu failed"}}
    return {"": {"csv": result.stdout[-20_000:]}}


def towers(context: Context) -> Iterator[Item]:
    """The table: INT8 as it is called, torch eager and as a graph, and torch.compile if wanted."""
    variants = ("lraee", "torch", "torch graph")
    for batch in batches(context):
        for name in names(context):
            run = partial(_time_tower, context, name, batch)
            yield Item(f"{name} batch {batch}", run, variants)
            if context.has_compile:
                compiled = partial(_time_compiled, context, name, batch)
                yield Item(f"{name} batch {batch}", compiled, ("torch.compile",))


@torch.inference_mode()
def _time_tower(context: Context, name: str, batch: int) -> Mapping[str, Values]:
    base = float_tower(context, name)
    fast: Any = lraee.accelerate(base)
    x = images(context, base, batch)
    alone, embedded = fast(x[:1]), fast(x)
    calls: dict[str, Callable[[], object]] = {
        "lraee": partial(fast, x), "torch": partial(base, x),
        "torch graph": captured(partial(base, x), context.target.device),
    }  # fmt: skip
    lines = lines_of(as_called(context, calls))
    is_same = bool(torch.equal(alone, embedded[:1]))
    return {**lines, "lraee": {**lines["lraee"], "same_bits_alone": is_same}}


@torch.inference_mode()
def _time_compiled(context: Context, name: str, batch: int) -> Mapping[str, Values]:
    base = float_tower(context, name)
    x = images(context, base, batch)
    if context.is_dry:
        call: Callable[[], object] = partial(base, x)  # compiling takes minutes on a CPU
    else:
        call = partial(torch.compile(base, mode="reduce-overhead", dynamic=False), x)
    return lines_of(as_called(context, {"torch.compile": call}))


def exits(context: Context) -> Iterator[Item]:
    """What one exit adds where no image exits."""
    for batch in batches(context):
        for name in names(context):
            run = partial(_time_exits, context, name, batch)
            yield Item(f"{name} batch {batch}", run, ("full depth", "one exit"))


@torch.inference_mode()
def _time_exits(context: Context, name: str, batch: int) -> Mapping[str, Values]:
    base = float_tower(context, name)
    full: Any = lraee.accelerate(base)
    fast: Any = lraee.accelerate(base, exits=random_exits(full, EXIT_AFTER))
    x = images(context, base, batch)
    is_same = bool(torch.equal(full(x), fast(x)))
    calls: dict[str, Callable[[], object]] = {
        "full depth": partial(full, x), "one exit": partial(fast, x),
    }  # fmt: skip
    lines = lines_of(as_called(context, calls))
    share = lines["one exit"]["ms"] / lines["full depth"]["ms"] - 1
    more = {"added_share": round(share, 4), "same_bits": is_same}
    return {**lines, "one exit": {**lines["one exit"], **more}}


PROFILES = (Step("profile", profiles, 15.0),)
STEPS = (*PROFILES, Step("towers", towers, 8.0), Step("exits", exits, 8.0))
