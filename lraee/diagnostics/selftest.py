"""Do the Triton kernels compute here what they are defined to, and how fast are they?"""

import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from lraee.diagnostics import doctor, interpreter, selftest_cases, selftest_sizes
from lraee.diagnostics import selftest_timing as selftest_time
from lraee.diagnostics.interpreter import Device
from lraee.diagnostics.selftest_sizes import Case, Sizes, Target
from lraee.kernels import device as devices
from lraee.kernels import register
from lraee.kernels.archs import DEFAULT_ARCH
from lraee.measurement import machine

SCHEMA = "lraee.selftest/1"


@dataclass(frozen=True)
class Row:
    """One case: `difference` is None where the kernel did what it is defined to."""

    kernel: str
    config: str
    shape: str
    difference: str | None
    seconds: float


def find_target(
    device: Device, *, command: str = "selftest", advice: str = "", index: int = 0
) -> Target:
    """The CUDA device of this index, or the interpreter with the configs of an A100.

    Raises: NotImplementedError with the reason where the kernels cannot run.
    """
    reason = register.unavailable_reason()
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        reason = doctor.cuda_rows()[0]
    if reason is not None:
        raise NotImplementedError(f"{command}: {reason}{advice}")
    if device == "interpreter":
        interpreter.require(device)
        return Target(torch.device("cpu"), DEFAULT_ARCH)
    gpu = torch.device("cuda", index)
    target = Target(gpu, devices.arch(gpu))  # an unsupported part is told before the mode
    interpreter.require(device)
    return target


def examine(device: Device, *, quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Runs every case, then on CUDA the timings; returns what `lraee selftest` writes as JSON.

    Args:
      device: "cuda", or "interpreter": tiny shapes on the CPU, no timings.
      quick: fewer shapes, shorter timings.
      progress: show progress bars.
    Raises: NotImplementedError with the reason where the kernels cannot run.
    """
    target = find_target(device)
    sizes = selftest_sizes.QUICK if quick else selftest_sizes.FULL
    if device == "interpreter":
        sizes = selftest_sizes.TINY
    rows = list(run(target, sizes, progress=progress))
    result = {
        "schema": SCHEMA,
        **machine.describe(),
        **describe(target),
        "quick": quick,
        "is_ok": all(row.difference is None for row in rows),
        "rows": [asdict(row) for row in rows],
        "times": [],
    }
    if device == "cuda" and not _is_lost(target.device):
        broken = {row.kernel for row in rows if row.difference is not None}
        times = selftest_time.measure(target.device, broken, quick=quick, progress=progress)
        result["times"] = [asdict(row) for row in times]
    return result


def run(target: Target, sizes: Sizes, *, progress: bool = False) -> Iterator[Row]:
    """Each case in turn. Where the device does not answer any more, the rest is not run."""
    cases: Sequence[Case] = list(selftest_cases.cases(target, sizes))
    lost = False
    for case in tqdm(cases, "cases", disable=not progress):
        start = time.perf_counter()
        difference = "not run: the device failed before" if lost else _difference(case)
        seconds = time.perf_counter() - start
        yield Row(case.kernel, case.config, case.shape, difference, seconds)
        lost = lost or (difference is not None and _is_lost(target.device))


def _difference(case: Case) -> str | None:
    try:
        with warnings.catch_warnings():
            # The interpreter is numpy's, which warns of the NaN and Inf that are put in
            warnings.simplefilter("ignore", RuntimeWarning)
            return case.difference()
    except Exception as error:  # whatever a launch raises is what this kernel does here
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _is_lost(device: torch.device) -> bool:
    """Whether an earlier fault keeps this process from the device for good."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def describe(target: Target) -> dict[str, str]:
    """What the header of a report says of the device."""
    if target.device.type != "cuda":
        part = f"configs of sm_{target.arch.capability} ({target.arch.part})"
        return {"device": "interpreter", "gpu": f"none: Triton's interpreter, {part}"}
    major, minor = torch.cuda.get_device_capability(target.device)
    return {
        "device": str(target.device),
        "gpu": torch.cuda.get_device_name(target.device),
        "capability": f"sm_{major}{minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else "unknown: nvidia-smi says nothing"
