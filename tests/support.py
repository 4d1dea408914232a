"""Comparisons and inputs that the tests share."""

from torch import Tensor

from lraee.diagnostics.selftest_inputs import generator, quantized_linear
from lraee.ops.error_bounds import EPS32, HALF_STEP

__all__ = [
    "EPS32", "HALF_STEP", "TEXT_BOUND", "assert_same", "assert_within", "generator",
    "quantized_linear",
]  # fmt: skip

TEXT_BOUND = 1e-5
"""Between a float32 text tower cut at the end of the texts and the whole one."""


def assert_same(actual: Tensor, expected: Tensor, **parameters: object) -> None:
    """Bit for bit; NaN equals NaN. A failure says how many, where, both values, parameters."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype, parameters)
    assert actual.shape == expected.shape, (actual.shape, expected.shape, parameters)
    differs = actual != expected
    if actual.is_floating_point():
        differs &= ~(actual.isnan() & expected.isnan())
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {actual.numel()} differ, first at {where}:"
            f" {actual[where].item()!r} instead of {expected[where].item()!r}; {parameters}"
        )


def assert_within(
    actual: Tensor, expected: Tensor, bound: Tensor | float, **parameters: object
) -> None:
    """|actual - expected| <= bound for each element; NaN only where NaN is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape, parameters)
    truth = expected.double()
    error = (actual.double() - truth).abs()
    is_wrong = ~(error <= bound) & ~(actual.isnan() & truth.isnan()) & (actual != expected)
    if is_wrong.any():
        where = tuple(is_wrong.nonzero()[0].tolist())
        allowed = bound[where].item() if isinstance(bound, Tensor) else bound
        raise AssertionError(
            f"{int(is_wrong.sum())} of {actual.numel()} beyond the bound, first at {where}:"
            f" {actual[where].item()!r} instead of {expected[where].item()!r},"
            f" allowed {allowed!r}; {parameters}"
        )
