"""int8_block on the CPU: the bits of the seven operators, at each level, batch and thread count."""

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import BlockOperands, Norm, PackedLinear, reference
from lraee.ops.backend import operators
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import assert_same, generator


def _linear(N: int, K: int, source: torch.Generator, *, has_scale: bool = False) -> PackedLinear:
    w, w_sum = ops.pack_weight(torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8))
    bias = torch.randn(N, generator=source)
    scale = torch.rand(N, generator=source) if has_scale else None
    return PackedLinear(w, torch.rand(N, generator=source) * 1e-3, w_sum, bias, scale)


def _block(D: int, hidden: int, seed: int, *, heads: int, causal: bool = False) -> BlockOperands:
    """A causal one has layer scales, c_fc's as well, and quick_gelu."""
    source = generator(seed)
    norms = [
        Norm(torch.rand(D, generator=source), torch.randn(D, generator=source)) for _ in range(2)
    ]
    return BlockOperands(
        norms[0], _linear(3 * D, D, source), _linear(D, D, source, has_scale=causal), norms[1],
        _linear(hidden, D, source, has_scale=causal), _linear(D, hidden, source, has_scale=causal),
        num_heads=heads, causal=causal, activation="quick_gelu" if causal else "gelu",
    )  # fmt: skip


def _variants(L: int, D: int, hidden: int, heads: int, B: int) -> dict[str, BlockOperands]:
    """Blocks of other families."""
    source = generator(11)
    block = _block(D, hidden, seed=12, heads=heads)
    mask = torch.rand(B, L, generator=source) < 0.7
    rms = [norm._replace(beta=None) for norm in (block.norm_1, block.norm_2)]
    return {
        "mask": block._replace(key_mask=mask),
        "rms": block._replace(norm_1=rms[0], norm_2=rms[1]),
    }


VARIANTS = ("mask", "rms")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first_only", [False, True])
def test_bits_of_the_operators_of_other_families(variant: str, first_only: bool) -> None:
    """Fused image by image, or operator by operator with shared threads; all levels."""
    for (B, L, D, hidden, heads), dtype in zip(
        [(1, 60, 64, 256, 2), (5, 17, 48, 100, 4), (2, 9, 32, 70, 2)], TYPES, strict=True
    ):
        x = torch.randn(B, L, D, generator=generator(B)).to(dtype)
        block = _variants(L, D, hidden, heads, B)[variant]

        def both(x: Tensor = x, block: BlockOperands = block, B: int = B) -> list[Tensor]:
            fused = ops.int8_block(x, block, first_only=first_only)
            apart = reference.int8_block(x, block, first_only, operators=operators("cpu"))
            return [fused, apart]

        for level in LEVELS:
            actual, expected = at_level(level, both)
            assert_same(actual, expected, level=level, B=B, dtype=dtype)
        assert_same_everywhere(both, B=B, L=L, D=D)


def test_padded_images_have_the_bits_of_their_valid_tokens() -> None:
    """An image in a batch padded to the longest, and alone: NaflexSigLIP's case."""
    lengths, L = (9, 4, 13), 13
    x = torch.randn(3, L, 32, generator=generator(1))
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    block = _block(32, 64, seed=2, heads=2)
    whole = ops.int8_block(x, block._replace(key_mask=mask))
    for b, length in enumerate(lengths):
        alone = ops.int8_block(x[b : b + 1, :length].contiguous(), block)
        assert_same(whole[b : b + 1, :length], alone, image=b)


def _by_operator(x: Tensor, block: BlockOperands) -> Tensor:
    return reference.int8_block(x, block, operators=operators("cpu"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "L", "D", "hidden", "heads"),
    [(1, 1, 16, 16, 1), (2, 50, 64, 256, 2), (5, 17, 40, 100, 5), (8, 7, 48, 70, 3)],
)  # fmt: skip
def test_bits_of_the_operators(
    B: int, L: int, D: int, hidden: int, heads: int, dtype: torch.dtype
) -> None:
    x = torch.randn(B, L, D, generator=generator(B)).to(dtype)
    for causal in (False, True):
        block = _block(D, hidden, seed=L, heads=heads, causal=causal)

        def both(block: BlockOperands = block) -> list[Tensor]:
            return [ops.int8_block(x, block), _by_operator(x, block)]

        for level in LEVELS:
            actual, expected = at_level(level, both)
            assert_same(actual, expected, level=level, causal=causal, dtype=dtype)
        assert_same_everywhere(both, B=B, L=L, D=D)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "L", "D", "hidden", "heads"),
    [(1, 1, 16, 16, 1), (1, 50, 64, 256, 2), (2, 50, 64, 256, 2), (5, 17, 40, 100, 5),
     (8, 7, 48, 70, 3)],
)  # fmt: skip
def test_the_first_token_alone_has_its_bits(
    B: int, L: int, D: int, hidden: int, heads: int, dtype: torch.dtype
) -> None:
    x = torch.randn(B, L, D, generator=generator(B)).to(dtype)
    for causal in (False, True):
        block = _block(D, hidden, seed=L, heads=heads, causal=causal)
        whole = ops.int8_block(x, block)

        def first(block: BlockOperands = block) -> list[Tensor]:
            return [ops.int8_block(x, block, first_only=True)]

        assert_same(first()[0], whole[:, :1], causal=causal)
        assert_same_everywhere(first, B=B, L=L, D=D)


def test_first_tokens_of_more_images_than_a_chunk_of_rows_holds() -> None:
    x = torch.randn(700, 3, 16, generator=generator(9))
    block = _block(16, 4096, seed=10, heads=1)
    x[417, 2, 3] = torch.nan
    actual = ops.int8_block(x, block, first_only=True)
    assert_same(actual, ops.int8_block(x, block)[:, :1])
    assert actual.isnan().flatten(1).any(1).nonzero()[:, 0].tolist() == [417]
    assert ops.int8_block(x[:0], block, first_only=True).shape == (0, 1, 16)


def test_long_sequences_are_cut_into_chunks_of_rows() -> None:
    """2,600 tokens are more than a chunk holds in the MLP."""
    x = torch.randn(2, 2600, 64, generator=generator(3))
    block = _block(64, 2048, seed=4, heads=1)
    actual = ops.int8_block(x, block)
    assert_same(actual, _by_operator(x, block))


def test_an_image_has_the_same_bits_in_any_batch_and_nan_stays_at_home() -> None:
    x = torch.randn(9, 13, 64, generator=generator(5))
    block = _block(64, 256, seed=6, heads=2)
    alone = torch.cat([ops.int8_block(x[i : i + 1], block) for i in range(9)])
    for B in range(1, 10):
        assert_same(ops.int8_block(x[:B], block), alone[:B], B=B)
    x[4, 3, 7] = torch.nan
    actual = ops.int8_block(x, block)
    others = [i for i in range(9) if i != 4]
    assert_same(actual[others], alone[others])
    assert actual[4].isnan().any()


def test_strided_tokens() -> None:
    x = torch.randn(4, 6, 32, generator=generator(7)).transpose(0, 1)
    block = _block(32, 64, seed=8, heads=2)
    actual = ops.int8_block(x, block)
    assert actual.is_contiguous()
    assert_same(actual, ops.int8_block(x.contiguous(), block))
    assert ops.int8_block(x[:0], block).shape == (0, 4, 32)
