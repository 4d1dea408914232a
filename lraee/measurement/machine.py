"""What a measurement says of where it ran: machine, threads, versions, command."""

import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from lraee.ops import registry

PACKAGES = ("torch", "triton", "open_clip_torch", "lraee")


def describe() -> dict[str, str | int]:
    """Return the header of a measurement; it names no host and no path of the machine."""
    return {
        "machine": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "operators": cpu_operators(),
        "threads": torch.get_num_threads(),
        "versions": ", ".join([f"python {platform.python_version()}", *map(_version, PACKAGES)]),
        "command": " ".join([_program(), *map(_without_folders, sys.argv[1:])]),
    }


def _program() -> str:
    """What was called: python -m MODULE, or the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _without_folders(word: str) -> str:
    """The word, or the file name of an absolute path."""
    return Path(word).name if Path(word).is_absolute() else word


def cpu_operators() -> str:
    """Return what runs the operators on CPU tensors: C++ and its level, reference, or nothing."""
    if registry.CPU_EXTENSION_ERROR is not None:
        return f"reference ({registry.CPU_EXTENSION_ERROR})"
    from lraee import _C

    try:
        return f"C++ {_C.isa()}"
    except ValueError as error:  # LRAEE_ISA names a level that is not there
        return f"nothing ({error})"


def available_cpus(root: Path = Path("/")) -> float:
    """Cores that this process may keep busy: its affinity, or a cgroup's CPU quota if that is less.

    1.5 is a quota of one and a half cores; at least 0.1. Reads cgroup v2 (cpu.max of the process's
    group and all above it) and v1 (cpu.cfs_quota_us).

    Args:
      root: where /proc and /sys lie.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return max(0.1, min([cpus, *_cgroup_quotas(root)]))


def threads_here() -> int:
    """Threads that this process may keep busy: its whole cores, at least 1; see available_cpus."""
    return max(1, math.floor(available_cpus()))


def limit_threads() -> int:
    """Take torch's threads down to threads_here, and return how many it has now.

    torch counts the host's cores: in a container with a quota its threads would wait for each
    other while the group is throttled. A lower number, as OMP_NUM_THREADS gives it, stays.
    """
    torch.set_num_threads(min(threads_here(), torch.get_num_threads()))
    return torch.get_num_threads()


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """Every quota that holds for this process, in cores."""
    top = root / "sys/fs/cgroup"
    for hierarchy, controllers, group in _cgroups(root / "proc/self/cgroup"):
        is_v2 = hierarchy == "0"
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        base = top if is_v2 else top / "cpu"
        # In a container the group's own path may not be mounted: what is there counts.
        for folder in (base / group.lstrip("/"), *(base / group.lstrip("/")).parents):
            yield from _quota(folder, is_v2=is_v2)
            if folder == base:
                break


def _cgroups(path: Path) -> list[list[str]]:
    rows = path.read_text().splitlines() if path.exists() else []
    return [row.split(":", 2) for row in rows if row.count(":") >= 2] or [["0", "", "/"]]


def _quota(folder: Path, *, is_v2: bool) -> Iterator[float]:
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def cpu_name() -> str:
    """Return the processor's own name, with family and model where Linux says them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for row in cpuinfo.read_text().splitlines():
        key, _, value = row.partition(":")
        fields.setdefault(key.strip(), value.strip())
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{fields.get('model name', platform.machine())} (family {family} model {model})"


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} absent"
