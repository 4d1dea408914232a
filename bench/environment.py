"""What a benchmark must say of itself: machine, kernels, threads, versions, command, commit."""

import subprocess
import sys
from pathlib import Path

from lraee import machine


def describe() -> dict[str, str]:
    """The header of a benchmark run; names no host."""
    found = {key: str(value) for key, value in machine.describe().items()}
    return found | {"command": " ".join([_program(), *sys.argv[1:]]), "commit": _commit()}


def _program() -> str:
    """How to start this program again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {program.name}" if program.suffix == ".py" else program.name


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
