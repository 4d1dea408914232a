"""float_attention in the interpreter, within the error of its formats and of the order of sums."""

import inspect

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned
from lraee.diagnostics.selftest_inputs import attention, generator, rope_and_mask
from lraee.kernels import live_rows, workspace
from lraee.kernels.configs import FloatAttentionConfig, float_attention_config, head_tiles
from lraee.kernels.float_attention import float_attention, float_attention_quantized
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.operands import AttentionOperands
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from tests.support import assert_same, assert_within

SMALL = FloatAttentionConfig(block_i=16, block_j=16, num_warps=4, num_stages=1)
"""Many tiles from few tokens."""


def check(
    B: int, L: int, H: int, d: int, *, seed: int, causal: bool = False, is_small: bool = True,
    has_rope: bool = False, has_mask: bool = False,
) -> None:  # fmt: skip
    qkv = attention(B, L, H, d, seed)
    rope, mask = rope_and_mask(B, L, H, d, seed) if has_rope or has_mask else (None, None)
    rope, mask = rope if has_rope else None, mask if has_mask else None
    if mask is not None:
        qkv[~mask] = torch.nan
    expected = reference.float_attention(qkv, H, causal, rope, mask)
    with guarded_outputs():
        actual = float_attention(
            poisoned(qkv, row_pad=seed % 3), H, causal,
            None if rope is None else poisoned(rope), None if mask is None else poisoned(mask),
            config=SMALL if is_small else None,
        )  # fmt: skip
    clean = qkv if mask is None else torch.where(mask[..., None], qkv, 0.0).to(qkv.dtype)
    bound = bounds.of_float_attention(clean, expected, H, rope)
    shown = torch.ones(B, L, dtype=torch.bool) if mask is None else mask
    facts = {"B": B, "L": L, "H": H, "d": d, "seed": seed, "causal": causal}
    assert_within(actual[shown], expected[shown], bound.expand_as(expected)[shown], **facts)


LENGTHS = (1, 2, 15, 16, 17, 31, 33, 49, 50, 63, 64, 65, 77, 129, 197, 257)


@pytest.mark.parametrize("causal", [False, True])
def test_every_kind_of_length(causal: bool) -> None:
    for seed, L in enumerate(LENGTHS):
        check(1, L, 1, 16, seed=seed, causal=causal, is_small=L < 100)


@pytest.mark.parametrize("d", [1, 8, 33, 64, 72, 80, 88, 96, 104, 112, 128])
def test_every_width_of_head(d: int) -> None:
    for seed in range(3):
        check(2, 20, 2, d, seed=seed, causal=seed == 1)


@pytest.mark.parametrize("causal", [False, True])
def test_rope(causal: bool) -> None:
    for seed, (B, L, H, d) in enumerate([(2, 9, 2, 8), (1, 40, 1, 80), (1, 66, 1, 64)]):
        check(B, L, H, d, seed=seed, causal=causal, has_rope=True)


@pytest.mark.parametrize("causal", [False, True])
def test_key_mask(causal: bool) -> None:
    """Any tokens. Masked NaN reaches no other row."""
    for seed, (B, L, H, d) in enumerate([(3, 9, 1, 8), (2, 66, 1, 24), (2, 33, 2, 72)]):
        check(B, L, H, d, seed=seed, causal=causal, has_mask=True, has_rope=seed == 2)


def test_a_query_without_keys_gives_zero() -> None:
    mask = torch.zeros(1, 70, dtype=torch.bool)
    assert not float_attention(attention(1, 70, 1, 8, 0), 1, False, None, mask).any()
    mask[0, 66] = True
    y = float_attention(attention(1, 70, 1, 8, 0), 1, True, None, mask)
    assert not y[:, :66].any() and y[:, 66:].any()


def test_padding_behind_the_tokens_changes_no_bit() -> None:
    for seed, (L, padded) in enumerate([(5, 9), (64, 70), (1, 65)]):
        qkv = attention(1, padded, 1, 8, seed)
        mask = torch.ones(1, padded, dtype=torch.bool)
        mask[:, L:] = False
        y = float_attention(qkv, 1, False, None, mask, config=SMALL)
        expected = float_attention(qkv[:, :L].contiguous(), 1, config=SMALL)
        assert_same(y[:, :L], expected, L=L, padded=padded)


@pytest.mark.parametrize("causal", [False, True])
def test_the_first_tokens_alone_have_the_same_bits(causal: bool) -> None:
    qkv = attention(3, 50, 2, 8, seed=1)
    whole = float_attention(qkv, 2, causal)
    for num_queries in (1, 16, 17, 50):
        with guarded_outputs():
            first = float_attention(qkv, 2, causal, num_queries=num_queries)
        assert_same(first, whole[:, :num_queries], num_queries=num_queries)


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    qkv = attention(5, 50, 2, 24, seed=2)
    whole = float_attention(qkv, 2)
    for b in range(5):
        assert_same(float_attention(qkv[b : b + 1], 2), whole[b : b + 1], b=b)


def test_a_later_tile_with_larger_scores() -> None:
    """What was added up before shrinks to nothing, or almost."""
    qkv = torch.randn(1, 150, 3 * 8, generator=generator(0))
    for factor in (1.0, 30.0, 3000.0):
        qkv[:, 70:, 8:16] *= factor
        expected = reference.float_attention(qkv, 1)
        bound = bounds.of_float_attention(qkv, expected, 1)
        assert_within(float_attention(qkv, 1), expected, bound, factor=factor)


def test_a_value_that_is_not_finite_stays_in_its_image() -> None:
    qkv = torch.randn(3, 7, 3 * 16, generator=generator(0))
    whole = float_attention(qkv, 2)
    for value in (float("nan"), float("inf")):
        broken_in = qkv.clone()
        broken_in[1, 3, 20] = value  # a key of head 0
        broken = float_attention(broken_in, 2)
        assert torch.equal(broken[[0, 2]], whole[[0, 2]])
        assert broken[1, :, :8].isnan().any()


def check_quantized(
    B: int, L: int, H: int, d: int, seed: int, num_queries: int | None = None
) -> None:
    """The same bits as float_attention followed by quantize_rows, NaN of one image in its rows."""
    qkv, symmetric = attention(B, L, H, d, seed), seed % 2 == 0
    qkv[B // 2, 0, 0] = torch.nan
    operands = AttentionOperands(H, seed % 3 == 0)
    y = float_attention(qkv, *operands, num_queries=num_queries)
    expected = reference.quantize_rows(y.reshape(-1, H * d), symmetric)
    with guarded_outputs():
        actual = float_attention_quantized(
            poisoned(qkv, row_pad=seed % 3), operands, symmetric=symmetric, num_queries=num_queries
        )
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, B=B, L=L, H=H, d=d, seed=seed, num_queries=num_queries)
    assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_quantized() -> None:
    for seed, L in enumerate((1, 17, 65)):
        check_quantized(1 + seed % 3, L, 1 + seed % 2, 8, seed)


def test_the_first_tokens_quantized() -> None:
    for seed, num_queries in enumerate((1, 17, 65)):
        check_quantized(2, 70, 2, 9, seed, num_queries)


def test_live_images_quantized() -> None:
    """Rows of the others are left, and no ticket stays."""
    qkv, operands = attention(3, 20, 2, 8, 1), AttentionOperands(2)
    expected = float_attention_quantized(qkv, operands, symmetric=False)
    for images in range(4):
        with live_rows.using(LiveRows(torch.tensor([images], dtype=torch.int32), 3)):
            actual = float_attention_quantized(qkv, operands, symmetric=False)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one[: 20 * images], other[: 20 * images], images=images)
        assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_no_images() -> None:
    rows = float_attention_quantized(torch.empty(0, 5, 24), AttentionOperands(2), symmetric=True)
    assert [len(part) for part in rows] == [0, 0, 0]
    assert float_attention(torch.empty(0, 5, 24), 2).shape == (0, 5, 8)


def test_the_config_does_not_depend_on_the_batch() -> None:
    names = list(inspect.signature(float_attention_config).parameters)
    assert names == ["L", "d", "x_bytes", "has_rope"]


def test_tiles_of_a_head_cover_it_with_less_than_16_channels_of_padding() -> None:
    for d in range(1, 257):
        tiles = head_tiles(d)
        ends = [first + width for first, width in tiles]
        assert [first for first, _ in tiles] == [0, *ends[:-1]]
        assert d <= ends[-1] < d + 16
        assert all(width & (width - 1) == 0 and width >= 16 for _, width in tiles)
    assert [sum(w for _, w in head_tiles(d)) for d in (64, 72, 80, 88, 104)] == [
        64,
        80,
        80,
        96,
        112,
    ]


def test_the_definition_is_torchs_attention() -> None:
    qkv = torch.randn(2, 9, 3 * 16, dtype=torch.float32, generator=generator(0))
    q, k, v = qkv.view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).double()
    for causal in (False, True):
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        expected: Tensor = y.transpose(1, 2).reshape(2, 9, 16).float()
        assert_within(reference.float_attention(qkv, 2, causal), expected, 1e-6)
