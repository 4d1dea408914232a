"""int8_attention on the CPU: each level within a derived bound of the exact result."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import error_bounds as bounds
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
    if L > 512:
        relative = (2 * min(reach, 86.0) + 16 + L / 64) * EPS32
        return _exact_in_fixed_point(logit, v, relative, qkv.dtype)
    p = torch.softmax(logit, -1)
    half = 0.0 if qkv.dtype is torch.float32 else HALF_STEP[qkv.dtype]
    smallest = 2.0**-25 if qkv.dtype is torch.float16 else 2.0**-120
    relative = (2 * min(reach, 86.0) + 16 + L / 64 + L) * EPS32 + half * (1 + half)
    v = v.double()
    bound = relative * (p @ v.abs()) + half * (p @ v).abs() + smallest * (1 + v.abs().sum(2, True))
    flat = [t.transpose(1, 2).reshape(B, L, H * d) for t in (p @ v, bound * 1.01)]
    return flat[0], flat[1]


def _exact_in_fixed_point(
    logit: Tensor, v: Tensor, relative: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """P V of more than 512 keys, and a bound on the error.

    p_q is exact but for those that the relative error of e * step takes across a tie: these are one
    off. The sum is exact; it is rounded to float32, and times scales that err by `relative`.
    """
    B, H, L, d = v.shape
    e = torch.exp(logit - logit.amax(-1, keepdim=True))
    step = (507904 / e.sum(-1, keepdim=True)).clamp(max=32767)
    scale = v.abs().amax(2, keepdim=True) / 4095
    v_q = torch.round(v * (1.0 / scale)).double()
    weight, p_q = e * step, torch.round(e * step)
    is_near_tie = (0.5 - (weight - p_q).abs() <= weight * relative).double()
    steps = scale.double() / (step * e.sum(-1, keepdim=True))
    y, moved = (p_q @ v_q) * steps, (is_near_tie @ v_q.abs()) * steps
    half = 0.0 if dtype is torch.float32 else HALF_STEP[dtype]
    smallest = 2.0**-25 if dtype is torch.float16 else 2.0**-120
    bound = moved + (8 * EPS32 + relative + half) * (y.abs() + moved) + smallest
    flat = [t.transpose(1, 2).reshape(B, L, H * d) for t in (y, bound * 1.01)]
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


@pytest.mark.parametrize("L", [257, 320, 512, 513, 577, 729])
def test_long_sequences_are_within_the_bound(L: int) -> None:
    for d, dtype in itertools.product((64, 72), TYPES if L > 512 else TYPES[:1]):
        qkv = _qkv(1, L, 2, d).to(dtype)
        for causal in (False, True) if L > 512 else (False,):
            expected, bound = _exact(qkv, 2, causal)
            for level in LEVELS[1:]:
                y = at_level(level, partial(_attend, qkv, 2, causal))[0]
                assert_within(y, expected, bound, L=L, d=d, level=level, causal=causal)


@pytest.mark.parametrize("dtype", TYPES)
def test_all_levels_and_thread_counts_agree_on_long_sequences(dtype: torch.dtype) -> None:
    for B, L, H, d in [(1, 513, 2, 72), (1, 600, 1, 7), (2, 514, 1, 40), (1, 577, 1, 128)]:
        qkv = _qkv(B, L, H, d).to(dtype)
        assert_same_everywhere(partial(_attend, qkv, H), B=B, L=L, H=H, d=d)
    assert_same_everywhere(partial(_attend, qkv, 1, True))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_the_error_of_fixed_point_is_small(sharpness: float) -> None:
    """Below that of P and V in bfloat16, however flat the rows; far below that of the scores."""
    qkv = _qkv(1, 729, 2, 72)
    qkv[:, :, :144] *= sharpness
    q, k, v = qkv.view(1, 729, 3, 2, 72).permute(2, 0, 3, 1, 4)
    k = k - k.mean(2, keepdim=True)
    (q_q, q_scale, _), (k_q, k_scale, _) = (
        reference.quantize_rows(each.reshape(-1, 72), True) for each in (q, k)
    )
    back = [(q_q * q_scale[:, None]).view(q.shape), (k_q * k_scale[:, None]).view(k.shape)]
    p = torch.softmax(back[0].double() @ back[1].double().mT / 72**0.5, -1)
    expected = p @ v.double()
    y = ops.int8_attention(qkv, num_heads=2).view(1, 729, 2, 72).transpose(1, 2)
    error = (y - expected).norm()
    in_half = p.bfloat16().double() @ v.bfloat16().double()
    truth = torch.softmax(q.double() @ k.double().mT / 72**0.5, -1) @ v.double()
    assert error < (in_half - expected).norm()
    assert error < 0.1 * (expected - truth).norm() or sharpness < 1


def test_long_sequences_with_values_of_all_kinds() -> None:
    """A channel of zeros, one of the smallest numbers, one loud token, odd numbers of keys."""
    qkv = _qkv(2, 515, 1, 24)
    qkv[:, :, 48] = 0.0
    qkv[:, :, 49] = 1e-40
    qkv[:, :, 50] *= 1e30
    qkv[:, 7, 51] = 1e6
    expected = reference.int8_attention(qkv, 1)
    for level in LEVELS:
        y = at_level(level, partial(_attend, qkv, 1))[0]
        assert_within(y, expected, bounds.of_attention(qkv, expected, 1), level=level)
        assert not y[:, :, :2].any()


def test_nan_and_inf_stay_in_their_image_of_long_sequences() -> None:
    """And in the channel that holds one, where it is a value."""
    clean = ops.int8_attention(_qkv(2, 514, 2, 16), num_heads=2)
    for place, poison in itertools.product((0, 35, 70), (math.nan, math.inf, -math.inf)):
        qkv = _qkv(2, 514, 2, 16)
        qkv[1, 4, place] = poison
        expected = reference.int8_attention(qkv, 2)
        for level in LEVELS:
            y = at_level(level, partial(_attend, qkv, 2))[0]
            assert_same(y[:1], clean[:1])
            assert torch.equal(y.isnan(), expected.isnan()), (place, poison, level)


def test_masked_tokens_of_long_sequences_change_no_bit() -> None:
    """The number of keys chooses between fixed point and float, not the padding."""
    for keys, L in ((500, 600), (520, 600)):
        qkv, mask = _qkv(1, L, 2, 24), torch.zeros(1, L, dtype=torch.bool)
        mask[0, torch.randperm(L, generator=generator(1))[:keys]] = True
        alone = qkv[:, mask[0]]
        qkv[~mask] = math.nan
        for level in LEVELS:
            y = at_level(level, lambda: [ops.int8_attention(qkv, num_heads=2, key_mask=mask)])[0]  # noqa: B023
            expected = at_level(level, partial(_attend, alone, 2))[0]
            assert_same(y[:, mask[0]], expected, level=level, keys=keys)


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


# Rotary positions and key masks


def _rope(R: int, d: int, seed: int = 5) -> Tensor:
    half = torch.rand(R, d // 2, generator=generator(seed)) * 2 * math.pi
    return torch.stack([half.cos(), half.sin()]).repeat(1, 1, 2)


def _turned(qkv: Tensor, H: int, rope: Tensor) -> Tensor:
    """qkv with Q and K rotated in float32, outside the operator."""
    B, L, D3 = qkv.shape
    x = qkv.clone().view(B, L, 3, H, D3 // 3 // H)
    cos, sin = rope[:, :, None, None]
    tail = x[:, L - rope.shape[1] :, :2]
    x1, x2 = tail.chunk(2, -1)
    tail.copy_(tail * cos + torch.cat([-x2, x1], -1) * sin)
    return x.view(B, L, D3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rope_has_the_bits_of_rotated_tokens(level: str, prefix: int) -> None:
    """The same float32 steps in the operator and before it."""
    for (d, H), causal in itertools.product([(16, 3), (40, 2), (64, 2), (2, 1)], (False, True)):
        qkv, rope = _qkv(2, 30, H, d), _rope(30 - prefix, d)

        def both(
            qkv: Tensor = qkv, rope: Tensor = rope, H: int = H, causal: bool = causal
        ) -> list[Tensor]:
            y = ops.int8_attention(qkv, num_heads=H, causal=causal, rope=rope)
            return [y, *_attend(_turned(qkv, H, rope), H, causal)]

        y, expected = at_level(level, both)
        assert_same(y, expected, level=level, d=d, causal=causal, prefix=prefix)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_masked_tokens_change_no_bit_of_the_others(level: str, dtype: torch.dtype) -> None:
    """Wherever they are, whatever they hold, rotated or not: the bits of a call without them."""
    for (L, H, d), has_rope in itertools.product([(21, 2, 16), (50, 1, 40)], (False, True)):
        qkv, rope = _qkv(3, L, H, d).to(dtype), _rope(L, d) if has_rope else None
        mask = torch.rand(3, L, generator=generator(L)) < 0.6
        mask[1] = torch.arange(L) < 7  # padding behind the tokens
        qkv[~mask] = math.nan

        def masked(
            qkv: Tensor = qkv, rope: Tensor | None = rope, mask: Tensor = mask, H: int = H
        ) -> list[Tensor]:
            return [ops.int8_attention(qkv, num_heads=H, rope=rope, key_mask=mask)]

        y = at_level(level, masked)[0]
        for b in range(3):
            valid = mask[b]
            alone = qkv[b : b + 1, valid]
            turned = None if rope is None else rope[:, valid]

            def unmasked(
                alone: Tensor = alone, turned: Tensor | None = turned, H: int = H
            ) -> list[Tensor]:
                return [ops.int8_attention(alone, num_heads=H, rope=turned)]

            assert_same(y[b, valid], at_level(level, unmasked)[0][0], level=level, image=b)


def test_a_causal_mask_and_a_key_mask() -> None:
    """Query i has the bits of the image of the valid tokens up to i, and itself as its query."""
    qkv = _qkv(1, 12, 2, 16)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0]]).bool()
    y = ops.int8_attention(qkv, num_heads=2, causal=True, key_mask=mask)
    assert not y[0, :2].any()  # no key to see
    alone = ops.int8_attention(qkv[:, mask[0]], num_heads=2, causal=True)
    assert_same(y[:, mask[0]], alone)
    everything = torch.ones(1, 12, dtype=torch.bool)
    plain = ops.int8_attention(qkv, num_heads=2, causal=True)
    assert_same(ops.int8_attention(qkv, num_heads=2, causal=True, key_mask=everything), plain)


def test_an_image_without_keys_gives_zero() -> None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    for level in LEVELS:
        y = at_level(
            level, lambda: [ops.int8_attention(_qkv(3, 5, 2, 16), num_heads=2, key_mask=mask)]
        )[0]
        assert not y[1].any() and y[0].any() and y[2].any()


def test_rope_and_mask_are_close_to_the_reference_operator() -> None:
    for dtype, causal in itertools.product(TYPES, (False, True)):
        qkv, rope = _qkv(3, 50, 2, 64).to(dtype), _rope(49, 64)
        mask = torch.rand(3, 50, generator=generator(1)) < 0.7
        y = ops.int8_attention(qkv, num_heads=2, causal=causal, rope=rope, key_mask=mask)
        expected = reference.int8_attention(qkv, 2, causal, rope, mask)
        bound = bounds.of_attention(qkv, expected, 2)
        assert_within(y, expected, bound, dtype=dtype, causal=causal)


def test_all_levels_and_thread_counts_agree_on_rope_and_mask() -> None:
    for B, L, H, d in [(1, 50, 3, 64), (3, 77, 1, 40), (2, 5, 2, 6)]:
        qkv, rope = _qkv(B, L, H, d), _rope(L - 1, d)
        mask = torch.rand(B, L, generator=generator(2)) < 0.5

        def call(
            qkv: Tensor = qkv, rope: Tensor = rope, mask: Tensor = mask, H: int = H
        ) -> list[Tensor]:
            return [ops.int8_attention(qkv, num_heads=H, rope=rope, key_mask=mask)]

        assert_same_everywhere(call, B=B, L=L, H=H, d=d)
