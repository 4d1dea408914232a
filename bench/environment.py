"""What a measurement must say of itself: machine, threads, versions, commit, command."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "open_clip_torch", "lraee")


def describe() -> dict[str, str]:
    """The header of a benchmark run; names no host and no path outside the repository."""
    return {
        "machine": f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}",
        "kernels": _isa(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"python {platform.python_version()}", *map(_version, PACKAGES)]),
        "commit": _commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for entry in cpuinfo.read_text().splitlines():
        key, _, value = entry.partition(":")
        fields.setdefault(key.strip(), value.strip())
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{fields.get('model name', platform.machine())} (family {family} model {model})"


def _isa() -> str:
    """The instruction set that the C++ operators chose, or that they are absent."""
    try:
        from lraee import _C
    except ImportError as error:
        return f"plain-torch reference ({error})"
    return _C.isa()


def _program() -> str:
    """How to start this program again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {program.name}" if program.suffix == ".py" else program.name


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} absent"


def _commit() -> str:
    """Short hash of the commit, with a + where the working tree differs from it."""
    root = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
