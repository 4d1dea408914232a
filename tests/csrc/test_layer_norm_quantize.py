"""layer_norm_quantize on the CPU: each level bit for bit as the definition."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import reference
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import assert_same, generator

SHAPES = [(1, 1), (3, 5), (50, 768), (17, 77), (5, 1024), (2, 130), (0, 7), (9, 64), (3, 1280)]


def _affine(D: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(D, generator=source), torch.randn(D, generator=source)


def _assert_defined(x: Tensor, level: str, eps: float = 1e-5) -> None:
    gamma, beta = _affine(x.shape[1], generator(x.shape[1]))
    for symmetric in (True, False):
        actual = at_level(
            level,
            partial(ops.layer_norm_quantize, x, gamma, beta, eps=eps, symmetric=symmetric),
        )
        expected = reference.layer_norm_quantize(x, gamma, beta, eps, symmetric)
        for name, left, right in zip(("x_q", "x_scale", "x_zero"), actual, expected, strict=True):
            assert_same(left, right, name=name, level=level, symmetric=symmetric, shape=x.shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_matches_the_definition(level: str, dtype: torch.dtype) -> None:
    source = generator(0)
    for M, D in SHAPES:
        x = torch.randn(M, D, generator=source) * 3 + torch.randn(M, 1, generator=source) * 10
        x = x.to(dtype)
        if M > 2:
            x[1, D // 2], x[2] = math.nan, 4.0  # a constant row has variance 0
        _assert_defined(x, level)
        _assert_defined(x, level, eps=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_outliers_and_extremes_match_the_definition(level: str) -> None:
    x = torch.randn(8, 200, generator=generator(1))
    x[0, 17], x[1, 3], x[2] = 1e4, -3e38, 1e30 * x[2]
    x[3], x[4], x[5, 0] = 1e-30 * x[3], 1e-42 * x[4], math.inf
    x[6] = 1e5 + x[6]
    _assert_defined(x, level)


@pytest.mark.parametrize("level", LEVELS)
def test_reads_any_strides(level: str) -> None:
    base = torch.randn(40, 100, generator=generator(2))
    for x in (base[:, 3:80], base[::3], base.T, base[::2, ::3]):
        _assert_defined(x, level)


def test_all_levels_and_thread_counts_agree() -> None:
    gamma, beta = _affine(515, generator(3))
    for symmetric, dtype in itertools.product((True, False), TYPES):
        x = torch.randn(300, 515, generator=generator(4)).to(dtype)
        assert_same_everywhere(
            partial(ops.layer_norm_quantize, x, gamma, beta, symmetric=symmetric)
        )


def test_a_row_has_the_same_bits_wherever_it_stands() -> None:
    source = generator(5)
    x = torch.randn(64, 768, generator=source)
    gamma, beta = _affine(768, source)
    whole = ops.layer_norm_quantize(x, gamma, beta, symmetric=False)
    for m in range(0, 64, 7):
        alone = ops.layer_norm_quantize(x[m : m + 1], gamma, beta, symmetric=False)
        for left, right in zip(alone, whole, strict=True):
            assert_same(left[0], right[m])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_matches_the_definition(level: str, dtype: torch.dtype) -> None:
    for (M, D), symmetric in itertools.product(SHAPES, (False, True)):
        x = (torch.randn(M, D, generator=generator(D)) * 3 + 1).to(dtype)
        if M > 2:
            x[1, D // 2], x[2] = math.nan, 0.0
        gamma = torch.randn(D, generator=generator(1))
        call = partial(ops.layer_norm_quantize, x, gamma, None, eps=1e-6, symmetric=symmetric)
        expected = reference.layer_norm_quantize(x, gamma, None, 1e-6, symmetric)
        for left, right in zip(at_level(level, call), expected, strict=True):
            assert_same(left, right, level=level, shape=x.shape)
