"""Comparisons and inputs that the tests share."""

import torch
from torch import Tensor

EPS32 = 2.0**-24
"""Largest relative error of one float32 rounding."""

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to each type."""


def generator(seed: int) -> torch.Generator:
    """A seeded source of random numbers, one per test."""
    return torch.Generator().manual_seed(seed)


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


def quantized_linear(
    M: int, N: int, K: int, *, seed: int = 0, extremes: bool = False
) -> dict[str, Tensor]:
    """Random arguments of int8_linear with w_q unpacked, so that each implementation packs it."""
    source = generator(seed)

    def int8(rows: int) -> Tensor:
        if extremes:
            picks = torch.randint(0, 2, (rows, K), generator=source)
            return torch.where(picks == 0, -128, 127).to(torch.int8)
        return torch.randint(-128, 128, (rows, K), generator=source, dtype=torch.int8)

    return {
        "x_q": int8(M),
        "x_scale": torch.rand(M, generator=source) * 0.02 + 1e-4,
        "x_zero": torch.randint(-128, 128, (M,), generator=source, dtype=torch.int32),
        "w_q": int8(N),
        "w_scale": torch.rand(N, generator=source) * 0.01 + 1e-5,
        "bias": torch.randn(N, generator=source),
        "layer_scale": torch.randn(N, generator=source),
        "residual": torch.randn(M, N, generator=source),
    }
