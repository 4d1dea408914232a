"""int8_attention on the CPU: each level within a derived bound of the exact result."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import reference
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import EPS32, HALF_STEP, assert_same, assert_within, generator

LENGTHS = [1, 2, 13, 49, 50, 77, 197]
HEAD_DIMS = [(16, 3), (32, 2), (40, 2), (64, 2), (80, 1), (128, 1), (7, 1)]


def _qkv(B: int, L: int, H: int, d: int, seed: int = 0) -> Tensor:
    """Activations with a common offset in K, as ViTs have it, and one loud channel."""
    qkv = torch.randn(B, L, 3 * H * d, generator=generator(seed))
    qkv[:, :, H * d : 2 * H * d] += 3.0
    qkv[:, :, 0] *= 5.0
    return qkv


def _attend(qkv: Tensor, H: int, causal: bool = False) -> list[Tensor]:
    return [ops.int8_attention(qkv, num_heads=H, causal=causal)]


def _exact(qkv: Tensor, H: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The definition with int8 scores, softmax and P V in float64, and a bound on the error.

    A logit differs from the row's largest by x with |x| <= reach. Relative errors of p, counted in
    float32 roundings: x itself moves exp by |x|; exp 2 of them (exp.h), in numerator and sum;
    the sum 7 + L / 64; reciprocal and product 2. P V adds L more of sum p |v|. Then P and y take
    the type of qkv. Below e^-86 exp gives 0.
    """
    B, L, D3 = qkv.shape
    d = D3 // 3 // H
    q, k, v = qkv.view(B, L, 3, H, d).permute(2, 0, 3, 1, 4).float()
    total = torch.zeros_like(k[:, :, 0])
    for token in range(L):
        total = total + k[:, :, token]
    k = k - (total / L)[:, :, None]
    q_q, q_scale, _ = reference.quantize_rows(q.reshape(-1, d), True)
    k_q, k_scale, _ = reference.quantize_rows(k.reshape(-1, d), True)
    score = q_q.double().view(B, H, L, d) @ k_q.double().view(B, H, L, d).transpose(-1, -2)
    root = torch.tensor(1.0 / math.sqrt(d))
    step = (q_scale * root).view(B, H, L, 1) * k_scale.view(B, H, 1, L)
    logit = (score.float() * step).double()
    reach = float(logit.max() - logit.min())
    if causal:
        logit = logit.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    p = torch.softmax(logit, -1)
    half = 0.0 if qkv.dtype is torch.float32 else HALF_STEP[qkv.dtype]
    smallest = 2.0**-25 if qkv.dtype is torch.float16 else 2.0**-120
    relative = (2 * min(reach, 86.0) + 16 + L / 64 + L) * EPS32 + half * (1 + half)
    v = v.double()
    bound = relative * (p @ v.abs()) + half * (p @ v).abs() + smallest * (1 + v.abs().sum(2, True))
    flat = [t.transpose(1, 2).reshape(B, L, H * d) for t in (p @ v, bound * 1.01)]
    return flat[0], flat[1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_is_within_the_bound_of_the_exact_softmax(level: str, dtype: torch.dtype) -> None:
    for L, (d, H), causal in itertools.product(LENGTHS, HEAD_DIMS, (False, True)):
        if (L > 50 and (d not in (64, 40) or level == "scalar")) or (causal and L in (13, 49)):
            continue
        qkv = _qkv(2, L, H, d).to(dtype)
        y = at_level(level, partial(_attend, qkv, H, causal))[0]
        expected, bound = _exact(qkv, H, causal)
        assert_within(y, expected, bound, L=L, d=d, level=level, causal=causal)


@pytest.mark.parametrize("L", [257, 320, 577])
def test_long_sequences_are_within_the_bound(L: int) -> None:
    qkv = _qkv(1, L, 2, 64)
    expected, bound = _exact(qkv, 2, False)
    for level in LEVELS[1:]:
        y = at_level(level, partial(_attend, qkv, 2))[0]
        assert_within(y, expected, bound, L=L, level=level)


def test_one_unit_of_a_score_would_be_seen() -> None:
    """The bound is far below the effect of a single wrong unit in an int32 score."""
    qkv = _qkv(1, 50, 1, 64)
    _, bound = _exact(qkv, 1, False)
    wrong = qkv.clone()
    _, q_scale, _ = reference.quantize_rows(qkv[0, :, :64], True)
    wrong[0, 7, 5] += q_scale[7]
    difference = ops.int8_attention(wrong, num_heads=1) - ops.int8_attention(qkv, num_heads=1)
    assert (difference.abs() > 10 * bound)[0, 7].any()


def test_close_to_the_reference_operator() -> None:
    for dtype, causal in itertools.product(TYPES, (False, True)):
        qkv = _qkv(1, 50, 4, 64).to(dtype)
        _, bound = _exact(qkv, 4, causal)
        y = ops.int8_attention(qkv, num_heads=4, causal=causal)
        # The reference stands off by as much again.
        assert_within(y, reference.int8_attention(qkv, 4, causal), 2 * bound, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_all_levels_and_thread_counts_agree(dtype: torch.dtype) -> None:
    cases = [(1, 50, 3, 64), (3, 77, 1, 40), (1, 130, 1, 64), (2, 5, 2, 7), (1, 33, 1, 128)]
    for B, L, H, d in cases:
        qkv = _qkv(B, L, H, d).to(dtype)
        for causal in (False, True):
            assert_same_everywhere(
                partial(_attend, qkv, H, causal),
                B=B, L=L, H=H, d=d, causal=causal,
            )  # fmt: skip


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    qkv = _qkv(9, 50, 2, 64)
    whole = ops.int8_attention(qkv, num_heads=2)
    for b in range(9):
        assert_same(ops.int8_attention(qkv[b : b + 1], num_heads=2), whole[b : b + 1], b=b)
    assert_same(ops.int8_attention(qkv.flip(0), num_heads=2), whole.flip(0))


def test_nan_and_inf_stay_in_their_image() -> None:
    clean = ops.int8_attention(_qkv(3, 20, 2, 16), num_heads=2)
    for place, poison in itertools.product((0, 35, 70), (math.nan, math.inf, -math.inf)):
        qkv = _qkv(3, 20, 2, 16)
        qkv[1, 4, place] = poison
        for level in LEVELS:
            y = at_level(level, partial(_attend, qkv, 2))[0]
            assert_same(y[::2], clean[::2])
            expected = reference.int8_attention(qkv, 2)
            assert torch.equal(y.isfinite(), expected.isfinite()), (place, poison, level)


def test_reads_any_strides() -> None:
    H, d = 2, 16
    base = _qkv(4, 60, H, d)
    wide = torch.randn(4, 60, 3 * H * d + 9, generator=generator(3))
    views = (base[::2], base[:, ::3], base.transpose(0, 1), wide[:, :, 5 : 5 + 3 * H * d])
    for qkv in (*views, base.transpose(1, 2).contiguous().transpose(1, 2)):
        expected = ops.int8_attention(qkv.contiguous(), num_heads=H)
        assert_same(ops.int8_attention(qkv, num_heads=H), expected)


def test_empty_batch_and_zero_rows() -> None:
    assert ops.int8_attention(torch.empty(0, 5, 48), num_heads=2).shape == (0, 5, 16)
    zeros = torch.zeros(1, 4, 48)
    assert_same(ops.int8_attention(zeros, num_heads=2), torch.zeros(1, 4, 16))


def test_one_token_is_its_own_value() -> None:
    qkv = _qkv(2, 1, 2, 16)
    for level in LEVELS:
        y = at_level(level, partial(_attend, qkv, 2))[0]
        assert_same(y, qkv[..., 64:])
