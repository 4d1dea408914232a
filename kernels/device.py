"""The architecture and name of a device, looked up once."""

import functools

import torch

from lraee.kernels.archs import ARCHS, DEFAULT_ARCH, Arch, unsupported_reason


@functools.cache
def arch(device: torch.device) -> Arch:
    """Architecture of a CUDA device; the interpreter's stand-in for any other.

    Raises: NotImplementedError with the reason where the int8 kernels do not run.
    """
    if device.type != "cuda":
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    reason = unsupported_reason(10 * major + minor)
    if reason is not None:
        raise NotImplementedError(f"lraee.kernels: no int8 kernel for this GPU: {reason}")
    return ARCHS[10 * major + minor]


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    """Name of a CUDA device as the user's tables have it, None for any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
