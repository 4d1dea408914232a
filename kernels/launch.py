"""The one place where a kernel is started."""

from typing import Any


def start(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Starts kernel on grid. No product is ever fused with a sum: the definition rounds both."""
    kernel[grid](*arguments, enable_fp_fusion=False, **constants)
