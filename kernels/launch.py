"""The one place where a kernel is started."""

from typing import Any

import torch


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: object) -> None:
    """Starts kernel on grid. No product is ever fused with a sum: the definition rounds both.

    On the GPU of the first argument, a tensor or a descriptor of one: Triton itself takes the
    current GPU, where memory of another cannot be read.
    """
    x = getattr(arguments[0], "base", arguments[0])
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, enable_fp_fusion=False, **constants)
        return
    kernel[grid](*arguments, enable_fp_fusion=False, **constants)
