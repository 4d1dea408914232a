"""A NaN or Inf stays in its own image: no other row changes a bit."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lraee
from lraee import ops
from tests.clip_models import make_lraee_tiny
from tests.support import assert_same, generator, quantized_linear

BAD = (math.nan, math.inf, -math.inf)


@torch.no_grad()
def test_two_hundred_placements_in_an_image():
    fast = lraee.accelerate(make_lraee_tiny())
    batch = 4
    images = torch.randn(batch, 3, 56, 56, generator=generator(0))
    clean = fast.encode_image(images)
    places = generator(1)
    for placement in range(200):
        image, channel = (int(torch.randint(n, (), generator=places)) for n in (batch, 3))
        row, column = torch.randint(56, (2,), generator=places).tolist()
        spoilt = images.clone()
        spoilt[image, channel, row, column] = BAD[placement % 3]
        result = fast.encode_image(spoilt)
        others = [i for i in range(batch) if i != image]
        assert result[image].isnan().all(), (placement, image, channel, row, column)
        assert_same(result[others], clean[others], placement=placement, image=image)


def _linear(x: Tensor) -> Tensor:
    case = quantized_linear(x.shape[0], 24, x.shape[1], seed=3)
    w, w_sum = ops.pack_weight(case["w_q"])
    quantized = ops.quantize_rows(x, symmetric=False)
    return ops.int8_linear(
        *quantized, ops.PackedLinear(w, case["w_scale"], w_sum, case["bias"]), activation="gelu"
    )


def _norm(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[1])
    x_q, x_scale, x_zero = ops.layer_norm_quantize(x, ones, ones, symmetric=False)
    return (x_q - x_zero[:, None]) * x_scale[:, None]


@pytest.mark.parametrize("operator", [_linear, _norm])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_in_a_row(operator: Callable[[Tensor], Tensor], bad: float) -> None:
    x = torch.randn(9, 40, generator=generator(2))
    clean = operator(x)
    for row in range(9):
        spoilt = x.clone()
        spoilt[row, (7 * row) % 40] = bad
        result = operator(spoilt)
        others = [i for i in range(9) if i != row]
        assert result[row].isnan().all()
        assert_same(result[others], clean[others], row=row, bad=bad)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_in_attention(bad: float) -> None:
    qkv = torch.randn(3, 11, 3 * 32, generator=generator(4))
    clean = ops.int8_attention(qkv, num_heads=1)
    for place in (5, 40, 70):  # in a query, a key, a value
        spoilt = qkv.clone()
        spoilt[1, 6, place] = bad
        result = ops.int8_attention(spoilt, num_heads=1)
        assert not result[1].isfinite().all()
        assert_same(result[[0, 2]], clean[[0, 2]], place=place, bad=bad)


@torch.no_grad()
def test_extreme_but_finite_neighbours_change_nothing():
    fast = lraee.accelerate(make_lraee_tiny())
    images = torch.randn(3, 3, 56, 56, generator=generator(5))
    clean = fast.encode_image(images)
    for magnitude in (1e4, 1e20, 3e38):
        spoilt = images.clone()
        spoilt[1] = magnitude
        result = fast.encode_image(spoilt)
        assert_same(result[[0, 2]], clean[[0, 2]], magnitude=magnitude)
