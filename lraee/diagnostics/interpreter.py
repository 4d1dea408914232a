"""Triton's interpreter: kernels on CPU tensors, for a process that chose it before Triton.

Triton binds its language to the interpreter, or not, when it is imported. So the environment must
name it first; `lraee selftest --device interpreter` does (lraee.cli.environment).
"""

from typing import Literal

Device = Literal["cuda", "interpreter"]
"""Where kernels may run."""

VARIABLE = "TRITON_INTERPRET"
DEVICE: Device = "interpreter"


def require(device: Device) -> None:
    """Raises NotImplementedError unless Triton is in the mode that this device needs."""
    from lraee.kernels import register  # the command line imports this file before Triton is chosen

    is_interpreted = register.is_interpreted()
    if device == DEVICE and not is_interpreted:
        raise NotImplementedError(
            f"{VARIABLE}=1 must be set before triton is imported, and it was imported without"
        )
    if device != DEVICE and is_interpreted:
        raise NotImplementedError(
            f"{VARIABLE} must not be set with --device {device}: kernels would be interpreted"
        )
