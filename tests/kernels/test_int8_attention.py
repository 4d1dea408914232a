"""int8_attention in the interpreter, within the error of exp and of the order of sums."""

import pytest
import torch
from torch import Tensor

from lraee import reference
from lraee.kernels import int8_attention as module
from lraee.kernels.configs import AttentionConfig
from lraee.kernels.int8_attention import int8_attention
from tests.kernels.guard import guarded_outputs, poisoned
from tests.support import EPS32, HALF_STEP, assert_within, generator

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def bound_of(qkv: Tensor, expected: Tensor, num_heads: int) -> Tensor:
    """Largest error against the definition, per output.

    Scores are the same bits. p = exp(.) / sum: both implementations err by less than 8 units of
    float32 and (L + 8) units through the sum; p may then round to the other neighbour in its type,
    and P @ V adds L terms of size at most max|v| with weights that sum to 1.
    """
    B, L, D3 = qkv.shape
    v = qkv.view(B, L, 3, num_heads, -1)[:, :, 2].double().abs().amax(1)
    step = HALF_STEP[qkv.dtype]
    error = (2 * (2 * L + 16) * EPS32 + 2 * step) * v.reshape(B, 1, D3 // 3)
    return error + 2 * step * expected.double().abs()


def check(B: int, L: int, H: int, d: int, *, seed: int, causal: bool, block_i: int = 64) -> None:
    dtype = TYPES[seed % 3]
    source = generator(seed)
    qkv = torch.randn(B, L, 3 * H * d, generator=source)
    qkv[..., H * d : 2 * H * d] += 4 * torch.randn(H * d, generator=source)  # keys with a mean
    qkv = qkv.to(dtype)
    expected = reference.int8_attention(qkv, H, causal)
    config = AttentionConfig(block_i, num_warps=4)
    with guarded_outputs():
        actual = int8_attention(poisoned(qkv, row_pad=seed % 3), H, causal, config=config)
    assert actual.dtype == dtype
    bound = bound_of(qkv, expected, H)
    assert_within(actual, expected, bound, B=B, L=L, H=H, d=d, seed=seed, causal=causal)


LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 49, 50, 63, 64, 65, 77, 127, 129, 197, 257)


@pytest.mark.parametrize("causal", [False, True])
def test_every_kind_of_length(causal: bool) -> None:
    for seed, L in enumerate(LENGTHS):
        check(1, L, 1, 8, seed=seed, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_every_length(causal: bool) -> None:
    for L in range(1, 258):
        check(1, L, 1, 8, seed=L, causal=causal)


def test_heads_images_and_widths() -> None:
    for seed, (B, L, H, d) in enumerate(
        [(2, 5, 3, 8), (1, 50, 2, 64), (3, 17, 1, 80), (2, 9, 2, 33), (1, 4, 4, 1), (1, 20, 1, 128)]
    ):
        check(B, L, H, d, seed=seed, causal=seed % 2 == 1, block_i=16)


@pytest.mark.parametrize("causal", [False, True])
def test_more_tokens_than_stay_on_chip(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(1, 330, 1, 8, seed=0, causal=causal, block_i=128)
    monkeypatch.setattr(module, "RESIDENT_TOKENS", 0)
    for seed, L in enumerate((1, 17, 64, 65, 130)):
        check(1, L, 1, 8, seed=seed, causal=causal)


def test_a_value_that_is_not_finite_stays_in_its_image() -> None:
    qkv = torch.randn(3, 7, 3 * 16)
    whole = int8_attention(qkv, 2)
    qkv[1, 3, 20] = float("nan")  # a key of head 0
    broken = int8_attention(qkv, 2)
    assert broken[1, :, :8].isnan().all()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])
    expected = reference.int8_attention(qkv, 2)
    assert torch.equal(broken.isnan(), expected.isnan())


def test_config_is_chosen() -> None:
    qkv = torch.randn(1, 20, 3 * 16)
    expected = reference.int8_attention(qkv, 2)
    assert_within(int8_attention(qkv, 2), expected, bound_of(qkv, expected, 2))
