"""How results of `lraee selftest` are compared and its cases are named."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lraee.ops import error_bounds as bounds

ROW_PADS = (0, 16, 3)
"""Elements between rows of an input: none, or as many as keep rows aligned to 16, or do not."""


def first_of(named: Sequence[tuple[str, Tensor, Tensor, Tensor | float]]) -> str | None:
    """The first difference among results (name, actual on any device, expected, bound)."""
    for name, actual, expected, bound in named:
        difference = bounds.first_difference(actual.cpu(), expected, bound)
        if difference is not None:
            return f"{name}: {difference}"
    return None


QUANTIZED = ("x_q", "x_scale", "x_zero")


def exact(names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """The first difference of any bit."""
    return first_of([(*row, 0.0) for row in zip(names, actual, expected, strict=True)])


def label(config: Any) -> str:
    """The numbers of a config by name."""
    return " ".join(f"{name}={value}" for name, value in vars(config).items())


def short(dtype: torch.dtype) -> str:
    """Its name without the module."""
    return str(dtype).removeprefix("torch.")
