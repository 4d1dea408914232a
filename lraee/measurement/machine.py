"""What a measurement says of where it ran: machine, threads, versions, command."""

import platform
import sys
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
