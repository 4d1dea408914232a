"""Triton's interpreter: kernels on CPU tensors, for a process that chose it before it began.

Triton binds its language to the interpreter, or not, when it is imported, and importing lraee
imports Triton. So the environment must name it first; this file alone reads and writes that.
"""

import os
import sys
from collections.abc import Sequence
from typing import Literal

from lraee.kernels import register

Device = Literal["cuda", "interpreter"]
"""Where kernels may run."""

VARIABLE = "TRITON_INTERPRET"
DEVICE: Device = "interpreter"


def is_requested(arguments: Sequence[str]) -> bool:
    """Whether these command-line arguments ask for `--device interpreter`."""
    pairs = zip(arguments, arguments[1:], strict=False)
    return f"--device={DEVICE}" in arguments or ("--device", DEVICE) in pairs


def restart() -> None:
    """Starts this very command again with the interpreter; returns where it already has it."""
    if os.environ.get(VARIABLE) != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, VARIABLE: "1"})


def require(device: Device) -> None:
    """Raises NotImplementedError unless Triton is in the mode that this device needs."""
    is_interpreted = register.is_interpreted()
    if device == DEVICE and not is_interpreted:
        raise NotImplementedError(
            f"{VARIABLE}=1 must be set before triton is imported, and it was imported without"
        )
    if device != DEVICE and is_interpreted:
        raise NotImplementedError(
            f"{VARIABLE} must not be set with --device {device}: kernels would be interpreted"
        )
