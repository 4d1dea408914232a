"""The one place where a kernel is started."""

import functools
from typing import Any

import torch

FIRST_TO_OVERLAP = 90
"""First compute capability of programmatic dependent launch."""


def overlap(capability: int) -> dict[str, object]:
    """Constants of a launch that may get ready while the kernel before it ends.

    Args:
      capability: 10 * major + minor, e.g. 90 for an H100.
    """
    if capability < FIRST_TO_OVERLAP:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@functools.cache
def _overlap_of(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return overlap(0)
    major, minor = torch.cuda.get_device_capability(device)
    return overlap(10 * major + minor)


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: object) -> None:
    """Starts kernel on grid. No product is ever fused with a sum: the definition rounds both.

    On the GPU of the first argument, which is a tensor: Triton itself takes the current one, where
    memory of another cannot be read.
    """
    x = arguments[0]
    constants |= {"enable_fp_fusion": False, **_overlap_of(x.device)}
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, **constants)
        return
    kernel[grid](*arguments, **constants)
