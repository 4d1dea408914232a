"""gated_quantize on the CPU: the definition's bits but for the activation, at every level."""

import itertools
import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import GateActivation, Norm, reference
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import EPS32, assert_same, assert_within, generator

NAMES = ("x_q", "x_scale", "x_zero", "r_q", "r_scale")
SHAPES = [(1, 1), (3, 5), (17, 77), (5, 1024), (2, 130), (0, 7), (9, 64), (3, 683)]


def _x(M: int, H: int, seed: int = 0) -> Tensor:
    source = generator(seed)
    x = torch.randn(M, 2 * H, generator=source) * torch.rand(M, 1, generator=source) * 4
    if M > 2:
        x[1, H // 2], x[2] = math.nan, 0.0
    if M > 8:
        x[3], x[4], x[5], x[6, 0] = x[3] * 1e-20, x[4] * 1e18, x[5] * 1e-23, math.inf
    return x


def _norms(H: int) -> list[Norm | None]:
    gamma, beta = torch.randn(2, H, generator=generator(H)).unbind()
    return [None, Norm(gamma, beta, 1e-6), Norm(gamma, None, 1e-5)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_without_an_activation_it_has_the_bits_of_the_definition(
    level: str, dtype: torch.dtype
) -> None:
    for M, H in SHAPES:
        x = _x(M, H).to(dtype)
        for norm in _norms(H):
            call = partial(ops.gated_quantize, x, activation="none", norm=norm)
            expected = reference.gated_quantize(x, "none", *(norm or ()))
            for name, actual, wanted in zip(NAMES, at_level(level, call), expected, strict=True):
                assert_same(actual, wanted, name=name, level=level, M=M, H=H)


def _product(x: Tensor, activation: str) -> Tensor:
    gate, up = x.double().chunk(2, 1)
    act = {
        "none": gate, "silu": gate * torch.sigmoid(gate),
        "gelu": 0.5 * gate * torch.erfc(-gate / math.sqrt(2)),
        "gelu_tanh": gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)),
        "quick_gelu": gate * torch.sigmoid(1.702 * gate),
    }[activation]  # fmt: skip
    return act * up


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", get_args(GateActivation))
def test_both_terms_are_the_product(level: str, activation: GateActivation) -> None:
    """Half a step of the second term, the activation, and the roundings of the terms.

    The activations below zero are within 1.6e-6 (csrc/cpu/numerics/gates.h); silu takes exp, a sum,
    a division and its product: 8 roundings. What the second term rounds is at most one step of the
    first, 2^-8 of the range: the sums add 4 roundings of the range.
    """
    x = torch.randn(30, 2 * 200, generator=generator(3)) * 3
    x_q, x_scale, x_zero, r_q, r_scale = at_level(
        level, partial(ops.gated_quantize, x, activation=activation)
    )
    back = (x_q.double() - x_zero.double()[:, None]) * x_scale.double()[:, None]
    back += r_q.double() * r_scale.double()[:, None]
    exact = _product(x, activation)
    up = x[:, 200:].double().abs()
    bound = r_scale.double()[:, None] * 0.501 + 1.7e-6 * up + 8 * EPS32 * exact.abs()
    assert_within(back, exact, bound + 4 * 256 * EPS32 * x_scale.double()[:, None], level=level)
    # One term alone errs by 254 times as much
    assert float((r_q.double() * r_scale.double()[:, None]).abs().max()) > 100 * float(bound.min())


def test_all_levels_and_thread_counts_agree() -> None:
    for (M, H), dtype in itertools.product(SHAPES, TYPES):
        for activation in get_args(GateActivation):
            x = _x(M, H).to(dtype)
            call = partial(ops.gated_quantize, x, activation=activation, norm=_norms(H)[M % 3])
            assert_same_everywhere(call, M=M, H=H, activation=activation)


def test_a_row_alone_and_strided() -> None:
    x = _x(40, 33)
    whole = ops.gated_quantize(x, activation="silu")
    for m in range(40):
        for actual, wanted in zip(
            ops.gated_quantize(x[m : m + 1], activation="silu"), whole, strict=True
        ):
            assert_same(actual[0], wanted[m], row=m)
    wide = torch.zeros(40, 70)
    wide[:, 2:68] = x
    for view in (wide[:, 2:68], x.t().contiguous().t()):
        for actual, wanted in zip(ops.gated_quantize(view), ops.gated_quantize(x), strict=True):
            assert_same(actual, wanted)
