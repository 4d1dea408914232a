"""int8_attention in the interpreter, within the error of exp and of the order of sums."""

import inspect

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned
from lraee.diagnostics.selftest_inputs import attention, generator
from lraee.kernels import configs, workspace
from lraee.kernels.configs import AttentionConfig, attention_config
from lraee.kernels.int8_attention import int8_attention, int8_attention_quantized
from lraee.kernels.operands import AttentionOperands
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from tests.support import assert_same, assert_within


def check(B: int, L: int, H: int, d: int, *, seed: int, causal: bool, block_i: int = 64) -> None:
    qkv = attention(B, L, H, d, seed)
    expected = reference.int8_attention(qkv, H, causal)
    config = AttentionConfig(block_i, num_warps=4)
    with guarded_outputs():
        actual = int8_attention(poisoned(qkv, row_pad=seed % 3), H, causal, config=config)
    assert actual.dtype == qkv.dtype
    bound = bounds.of_attention(qkv, expected, H)
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
def test_several_tiles_of_keys(causal: bool) -> None:
    check(1, 330, 1, 8, seed=0, causal=causal, block_i=128)


def test_float_values_where_the_definition_is_in_fixed_point() -> None:
    check(1, 520, 1, 8, seed=0, causal=False, block_i=128)


@pytest.mark.parametrize("causal", [False, True])
def test_the_first_tokens_alone_have_the_same_bits(causal: bool) -> None:
    qkv = attention(3, 50, 2, 8, seed=1)
    whole = int8_attention(qkv, 2, causal)
    for num_queries in (1, 16, 17, 50):
        with guarded_outputs():
            first = int8_attention(qkv, 2, causal, num_queries=num_queries)
        assert_same(first, whole[:, :num_queries], num_queries=num_queries)


def test_a_later_tile_with_larger_scores() -> None:
    """What was added up before shrinks to nothing, or almost."""
    qkv = torch.randn(1, 150, 3 * 8)
    for factor in (1.0, 30.0, 3000.0):
        qkv[:, 70:, 8:16] *= factor
        expected = reference.int8_attention(qkv, 1)
        assert_within(
            int8_attention(qkv, 1), expected, bounds.of_attention(qkv, expected, 1), factor=factor
        )


def test_the_config_does_not_depend_on_the_batch() -> None:
    """Nor then does the order in which threads add up probabilities."""
    assert list(inspect.signature(attention_config).parameters) == ["L", "d", "causal", "has_mask"]


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
    assert_within(int8_attention(qkv, 2), expected, bounds.of_attention(qkv, expected, 2))


def check_quantized(
    B: int, L: int, H: int, d: int, seed: int, num_queries: int | None = None
) -> None:
    """The same bits as int8_attention followed by quantize_rows, NaN of one image in its rows."""
    qkv, symmetric = attention(B, L, H, d, seed), seed % 2 == 0
    qkv[B // 2, 0, 0] = torch.nan
    y = int8_attention(qkv, H, seed % 3 == 0, num_queries=num_queries)
    expected = reference.quantize_rows(y.reshape(-1, H * d), symmetric)
    with guarded_outputs():
        actual = int8_attention_quantized(
            poisoned(qkv, row_pad=seed % 3),
            AttentionOperands(H, seed % 3 == 0),
            symmetric=symmetric,
            num_queries=num_queries,
        )
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, B=B, L=L, H=H, d=d, seed=seed, num_queries=num_queries)
    assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_quantized() -> None:
    for seed, L in enumerate(LENGTHS[::3]):
        check_quantized(1 + seed % 3, L, 1 + seed % 2, 8, seed)


def test_the_first_tokens_quantized() -> None:
    for seed, num_queries in enumerate((1, 16, 17, 63, 64, 65)):
        check_quantized(2, 70, 2, 9, seed, num_queries)


def test_many_rows_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of several rows, the last of an image not full; and one row of each image."""
    monkeypatch.setattr(configs, "MOST_SPREAD_ROWS", 0)
    check_quantized(3, 21, 1, 8, seed=1)
    check_quantized(3, 70, 2, 8, seed=2)
    check_quantized(5, 2, 1, 8, seed=3, num_queries=1)


@pytest.mark.slow
def test_many_lengths_quantized() -> None:
    """Each eighth: an int8_attention of every length is tested above, what follows it is rows."""
    for L in range(1, 258, 8):
        check_quantized(1, L, 1, 8, seed=L)


def test_no_images_quantized() -> None:
    x_q, x_scale, x_zero = int8_attention_quantized(
        torch.empty(0, 5, 24), AttentionOperands(2), symmetric=True
    )
    assert x_q.shape == (0, 8) and x_scale.shape == x_zero.shape == (0,)


# Rotary positions and key masks


def angles(R: int, d: int, seed: int) -> Tensor:
    """cos and sin of random angles [2, R, d], each half alike, as towers have them."""
    half = torch.rand(R, d // 2, generator=generator(seed)) * 6.28
    return torch.stack([half.cos(), half.sin()]).repeat(1, 1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_rope(causal: bool) -> None:
    for seed, (B, L, H, d, prefix) in enumerate([(2, 9, 2, 8, 1), (1, 66, 1, 48, 5)]):  # fmt: skip  # noqa: E501
        qkv, rope = attention(B, L, H, d, seed), angles(L - prefix, d, seed)
        with guarded_outputs():
            y = int8_attention(poisoned(qkv), H, causal, poisoned(rope))
        expected = reference.int8_attention(qkv, H, causal, rope)
        assert_within(y, expected, bounds.of_attention(qkv, expected, H), seed=seed)


@pytest.mark.parametrize("causal", [False, True])
def test_key_mask(causal: bool) -> None:
    """Any tokens: within the bound. Masked NaN reaches no other row."""
    for seed, (B, L, H, d) in enumerate([(3, 9, 1, 8), (2, 66, 1, 8)]):
        qkv, rope = attention(B, L, H, d, seed), angles(L - 1, d, seed)
        mask = torch.rand(B, L, generator=generator(seed)) < 0.5
        mask[0, : L // 2], mask[1] = False, False
        qkv[~mask] = torch.nan
        with guarded_outputs():
            y = int8_attention(poisoned(qkv), H, causal, rope, poisoned(mask))
        expected = reference.int8_attention(qkv, H, causal, rope, mask)
        clean = torch.where(mask[..., None], qkv, 0.0).to(qkv.dtype)
        bound = bounds.of_attention(clean, expected, H)
        assert_within(y[mask], expected[mask], bound[mask], seed=seed)


def test_padding_behind_the_tokens_changes_no_bit() -> None:
    for seed, (L, padded) in enumerate([(5, 9), (64, 70), (1, 65)]):
        qkv = attention(1, padded, 1, 8, seed)
        rope = angles(padded, 8, seed)
        mask = torch.ones(1, padded, dtype=torch.bool)
        mask[:, L:] = False
        y = int8_attention(qkv, 1, False, rope, mask)
        expected = int8_attention(qkv[:, :L].contiguous(), 1, False, rope[:, :L].contiguous())
        assert_same(y[:, :L], expected, L=L, padded=padded)


def test_a_query_without_keys_gives_zero() -> None:
    mask = torch.zeros(1, 70, dtype=torch.bool)
    assert not int8_attention(attention(1, 70, 1, 8, 0), 1, False, None, mask).any()
    mask[0, 66] = True
    y = int8_attention(attention(1, 70, 1, 8, 0), 1, True, None, mask)
    assert not y[:, :66].any() and y[:, 66:].any()
