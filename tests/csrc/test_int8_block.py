"""int8_block on the CPU: the bits of the seven operators, at each level, batch and thread count."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import block
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import assert_same, generator


def _linear(N: int, K: int, source: torch.Generator, *, has_scale: bool = False) -> list[Any]:
    w, w_sum = ops.pack_weight(torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8))
    bias = torch.randn(N, generator=source)
    scale = [torch.rand(N, generator=source)] if has_scale else []
    return [w, torch.rand(N, generator=source) * 1e-3, w_sum, bias, *scale]


def _arguments(D: int, hidden: int, seed: int, *, has_scale: bool = False) -> list[Any]:
    source = generator(seed)
    norms = [[torch.rand(D, generator=source), torch.randn(D, generator=source)] for _ in range(2)]
    return [
        norms[0], _linear(3 * D, D, source), _linear(D, D, source, has_scale=has_scale),
        norms[1], _linear(hidden, D, source), _linear(D, hidden, source, has_scale=has_scale),
    ]  # fmt: skip


def _by_operator(x: Tensor, arguments: list[Any], heads: int, causal: bool, act: str) -> Tensor:
    return block.int8_block(
        x, *arguments, (1e-5, 1e-5), (False,) * 4, heads, causal, act, operators=torch.ops.lraee
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "L", "D", "hidden", "heads"),
    [(1, 1, 16, 16, 1), (2, 50, 64, 256, 2), (5, 17, 40, 100, 5), (8, 7, 48, 70, 3)],
)  # fmt: skip
def test_bits_of_the_operators(
    B: int, L: int, D: int, hidden: int, heads: int, dtype: torch.dtype
) -> None:
    x = torch.randn(B, L, D, generator=generator(B)).to(dtype)
    for causal, act in ((False, "gelu"), (True, "quick_gelu")):
        arguments = _arguments(D, hidden, seed=L, has_scale=causal)

        def both(act: str = act, causal: bool = causal, a: list[Any] = arguments) -> list[Tensor]:
            return [ops.int8_block(x, *a, num_heads=heads, causal=causal, activation=act),
                    _by_operator(x, a, heads, causal, act)]  # fmt: skip

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
        arguments = _arguments(D, hidden, seed=L, has_scale=causal)
        whole = ops.int8_block(x, *arguments, num_heads=heads, causal=causal)

        def first(arguments: list[Any] = arguments, causal: bool = causal) -> list[Tensor]:
            options = {"num_heads": heads, "causal": causal, "first_only": True}
            return [ops.int8_block(x, *arguments, **options)]

        assert_same(first()[0], whole[:, :1], causal=causal)
        assert_same_everywhere(first, B=B, L=L, D=D)


def test_first_tokens_of_more_images_than_a_chunk_of_rows_holds() -> None:
    x = torch.randn(700, 3, 16, generator=generator(9))
    arguments = _arguments(16, 4096, seed=10)
    x[417, 2, 3] = torch.nan
    actual = ops.int8_block(x, *arguments, num_heads=1, first_only=True)
    assert_same(actual, ops.int8_block(x, *arguments, num_heads=1)[:, :1])
    assert actual.isnan().flatten(1).any(1).nonzero()[:, 0].tolist() == [417]
    assert ops.int8_block(x[:0], *arguments, num_heads=1, first_only=True).shape == (0, 1, 16)


def test_long_sequences_are_cut_into_chunks_of_rows() -> None:
    """2,600 tokens are more than a chunk holds in the MLP."""
    x = torch.randn(2, 2600, 64, generator=generator(3))
    arguments = _arguments(64, 2048, seed=4)
    actual = ops.int8_block(x, *arguments, num_heads=1)
    assert_same(actual, _by_operator(x, arguments, 1, False, "gelu"))


def test_an_image_has_the_same_bits_in_any_batch_and_nan_stays_at_home() -> None:
    x = torch.randn(9, 13, 64, generator=generator(5))
    arguments = _arguments(64, 256, seed=6)
    alone = torch.cat([ops.int8_block(x[i : i + 1], *arguments, num_heads=2) for i in range(9)])
    for B in range(1, 10):
        assert_same(ops.int8_block(x[:B], *arguments, num_heads=2), alone[:B], B=B)
    x[4, 3, 7] = torch.nan
    actual = ops.int8_block(x, *arguments, num_heads=2)
    others = [i for i in range(9) if i != 4]
    assert_same(actual[others], alone[others])
    assert actual[4].isnan().any()


def test_strided_tokens() -> None:
    x = torch.randn(4, 6, 32, generator=generator(7)).transpose(0, 1)
    arguments = _arguments(32, 64, seed=8)
    actual = ops.int8_block(x, *arguments, num_heads=2)
    assert actual.is_contiguous()
    assert_same(actual, ops.int8_block(x.contiguous(), *arguments, num_heads=2))
    assert ops.int8_block(x[:0], *arguments, num_heads=2).shape == (0, 4, 32)
