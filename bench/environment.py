"""What a benchmark must say of itself: machine, kernels, threads, versions, command, commit."""

import subprocess
from pathlib import Path

from lraee.measurement import machine


def describe() -> dict[str, str]:
    """The header of a benchmark run; names no host."""
    return {key: str(value) for key, value in machine.describe().items()} | {"commit": _commit()}


def _commit() -> str:
    """Short hash of the commit, with a + where the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
