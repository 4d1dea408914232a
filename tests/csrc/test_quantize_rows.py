"""quantize_rows on the CPU: each level against the definition, and what must hold for any row."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lraee import ops
from lraee.ops import reference
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import assert_same, generator

SHAPES = [(1, 1), (3, 5), (50, 768), (17, 77), (5, 3072), (2, 130), (0, 7), (4, 0), (9, 64)]
TINY = float(np.finfo(np.float32).tiny)


def _assert_defined(x: Tensor, level: str, **parameters: object) -> None:
    """Both kinds of quantization at the level, bit for bit as the definition has them."""
    for symmetric in (True, False):
        actual = at_level(level, partial(ops.quantize_rows, x, symmetric=symmetric))
        expected = reference.quantize_rows(x, symmetric)
        for name, left, right in zip(("x_q", "x_scale", "x_zero"), actual, expected, strict=True):
            assert_same(left, right, name=name, level=level, symmetric=symmetric, **parameters)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_matches_the_definition(level: str, dtype: torch.dtype) -> None:
    source = generator(0)
    for M, K in SHAPES:
        x = (torch.randn(M, K, generator=source) * 3).to(dtype)
        if M > 2 and K > 2:
            x[1, 2], x[2] = math.nan, 0
        _assert_defined(x, level, M=M, K=K)


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_rows_match_the_definition(level: str) -> None:
    largest = 3.4028234663852886e38
    rows = [
        [largest, -largest], [largest, 0.0], [-largest, 1.0], [math.inf, 1.0], [-math.inf, 1.0],
        [math.nan, 1.0], [0.0, -0.0], [TINY, -TINY], [TINY * 127, TINY], [TINY * 126, TINY],
        [1e-45, -1e-45], [1e-40, 3e-40], [TINY * 255, 0.0], [-TINY * 254, 0.0], [1.0, -1.0],
        [5.0, 5.0], [-5.0, -5.0], [127.0, 0.5], [127.0, 1.5], [127.0, 126.5], [2.5, 254.5],
    ]  # fmt: skip
    for width in (2, 16, 19, 70):
        x = torch.tensor(rows).repeat(1, 35)[:, :width]
        _assert_defined(x, level, width=width)
    _assert_defined(torch.tensor([[65504.0, -65504.0], [6e-8, 6e-8]]).half(), level)
    _assert_defined(torch.tensor([[3e38, -3e38], [1e-38, 1e-40]]).bfloat16(), level)


@pytest.mark.parametrize("level", LEVELS)
def test_halves_round_to_even(level: str) -> None:
    halves = torch.arange(-127, 127) + 0.5
    x = torch.cat([torch.tensor([127.0]), halves])[None]
    x_q, _, _ = at_level(level, lambda: ops.quantize_rows(x, symmetric=True))
    assert x_q[0, 1:].tolist() == [round(float(half)) for half in halves]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("exponent", [-62, -60, -30, 0, 58, 62])
def test_quotients_next_to_ties_round_as_a_division_does(level: str, exponent: int) -> None:
    """x at scale * (k + 1/2) and two floats to each side, scales on both sides of what fits."""
    source = generator(exponent)
    for _ in range(40):
        top = (1 + torch.rand(1, generator=source)) * 2.0**exponent * 127
        scale = top / 127
        ties = (torch.arange(-127, 127) + 0.5) * scale
        near = [ties]
        for _ in range(2):
            near = [torch.nextafter(near[0], near[0] - scale), *near]
            near = [*near, torch.nextafter(near[-1], near[-1] + scale)]
        x = torch.cat([top, *near])[None]
        _assert_defined(x, level, exponent=exponent)


@pytest.mark.parametrize("level", LEVELS)
def test_reads_any_strides(level: str) -> None:
    base = torch.randn(40, 100, generator=generator(1))
    for x in (base[:, 3:80], base[::3], base.T, base[::2, ::3], base[:1].expand(5, 100)):
        _assert_defined(x, level)


def test_all_levels_and_thread_counts_agree() -> None:
    for symmetric, dtype in itertools.product((True, False), TYPES):
        x = torch.randn(300, 515, generator=generator(2)).to(dtype)
        assert_same_everywhere(partial(ops.quantize_rows, x, symmetric=symmetric))


def test_every_bfloat16_and_float16_value_is_read_right() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in TYPES[1:]:
        # Rows of 64 neighbours, so that most are finite and a few hold Inf or NaN.
        x = bits.view(dtype).view(-1, 64)
        for level in LEVELS:
            _assert_defined(x, level, dtype=dtype)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows_of = st.lists(finite, min_size=1, max_size=150)


@settings(max_examples=150, deadline=None)
@given(rows_of, st.booleans())
def test_round_trip_is_within_half_a_step(row: list[float], symmetric: bool) -> None:
    x = torch.tensor([row])
    x_q, x_scale, x_zero = ops.quantize_rows(x, symmetric=symmetric)
    if not math.isfinite(x_scale):
        assert not symmetric and x.max().double() - x.min().double() > 3.4e38
        return
    error = ((x_q.double() - x_zero) * x_scale.double() - x.double()).abs().max()
    # Half a step; the quotient's own rounding, 2^-24 of at most 255, decides ties either way.
    assert error <= 0.5 * x_scale.double() * (1 + 2.0**-14)


@settings(max_examples=100, deadline=None)
@given(rows_of, st.integers(-20, 20), st.booleans())
def test_a_power_of_two_changes_the_scale_alone(
    row: list[float], exponent: int, symmetric: bool
) -> None:
    x = torch.tensor([row])
    scaled = x * 2.0**exponent
    # Exact only while nothing leaves the normal range, and the step neither.
    normal = torch.cat([x, scaled])[:, x[0] != 0]
    if normal.numel() == 0 or not (
        TINY * 512 < float(normal.abs().min()) and normal.abs().max() < 1e38
    ):
        return
    x_q, x_scale, x_zero = ops.quantize_rows(x, symmetric=symmetric)
    y_q, y_scale, y_zero = ops.quantize_rows(scaled, symmetric=symmetric)
    assert_same(y_q, x_q)
    assert_same(y_zero, x_zero)
    assert_same(y_scale, x_scale * 2.0**exponent)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 200), st.booleans())
def test_rows_do_not_see_each_other(seed: int, M: int, K: int, symmetric: bool) -> None:
    source = generator(seed)
    x = torch.randn(M, K, generator=source) * 10 ** (torch.rand(M, 1, generator=source) * 8 - 4)
    order = torch.randperm(M, generator=source)
    for left, right in zip(
        ops.quantize_rows(x[order], symmetric=symmetric),
        ops.quantize_rows(x, symmetric=symmetric),
        strict=True,
    ):
        assert_same(left, right[order])
    x[M // 2, K // 2] = math.nan if seed % 2 else math.inf
    results = ops.quantize_rows(x, symmetric=symmetric)
    assert results[1].isnan().tolist() == [m == M // 2 for m in range(M)]
    assert not results[0][M // 2].any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=150))
def test_any_float_at_all_matches_the_definition(row: list[float]) -> None:
    for level in LEVELS:
        _assert_defined(torch.tensor([row, row[::-1]]), level)
