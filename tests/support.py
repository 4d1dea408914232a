"""Comparisons and inputs that the tests share."""

from torch import Tensor

from lraee.diagnostics.selftest_inputs import generator, quantized_linear
from lraee.ops.error_bounds import EPS32, HALF_STEP, first_difference

__all__ = [
    "EPS32", "HALF_STEP", "TEXT_BOUND", "assert_same", "assert_within", "generator",
    "quantized_linear",
]  # fmt: skip

TEXT_BOUND = 1e-5
"""Between a float32 text tower cut at the end of the texts and the whole one."""


def assert_same(actual: Tensor, expected: Tensor, **parameters: object) -> None:
    """Bit for bit; NaN equals NaN. A failure says how many, where, both values, parameters."""
    difference = first_difference(actual, expected)
    assert difference is None, f"{difference}; {parameters}"


def assert_within(
    actual: Tensor, expected: Tensor, bound: Tensor | float, **parameters: object
) -> None:
    """|actual - expected| <= bound for each element; NaN only where NaN is expected.

    The types may differ, such as that of a kernel and a definition in float64.
    """
    difference = first_difference(actual.double(), expected.double(), bound)
    assert difference is None, f"{difference}; {parameters}"
