"""int8_block in the interpreter: seven launches, and the bits of its operators one by one."""

import pytest
import torch
from torch import Tensor

from bench.launches import launches_of
from lraee.diagnostics import selftest_cases, selftest_inputs
from lraee.kernels.int8_block import int8_block
from lraee.kernels.operands import BlockOperands, PackedLinear
from lraee.ops import reference
from tests.support import assert_same, assert_within

H, D = 2, 32


def arguments(B: int, L: int, seed: int, activation: str = "none") -> tuple[Tensor, BlockOperands]:
    x, operands = selftest_inputs.block(B, L, H, D // H, seed, torch.device("cpu"))
    return x, operands._replace(activation=activation)


def one_by_one(x: Tensor, operands: BlockOperands, *, first_only: bool = False) -> Tensor:
    """The block by launchers that quantize rows in a launch of their own."""
    launchers = selftest_cases.launchers()
    return reference.int8_block(x, operands, first_only, operators=launchers)


def test_the_bits_of_its_operators_one_by_one() -> None:
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9), (1, 50)]):
        given = arguments(B, L, seed, "quick_gelu" if seed == 2 else "none")
        for first_only in (False, True):
            expected = one_by_one(*given, first_only=first_only)
            assert_same(int8_block(*given, first_only=first_only), expected, seed=seed)


def test_padding_tokens_are_no_keys() -> None:
    x, operands = arguments(2, 9, 1, "gelu")
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    masked = operands._replace(key_mask=mask)
    actual = int8_block(x, masked)
    assert_same(actual, one_by_one(x, masked))
    assert_same(actual[1:, :4], int8_block(x[1:, :4].contiguous(), operands))


def test_the_first_token_alone_has_its_bits() -> None:
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9)]):
        given = arguments(B, L, seed, "gelu" if seed == 2 else "none")
        assert_same(int8_block(*given, first_only=True), int8_block(*given)[:, :1], seed=seed)


def test_it_is_the_block() -> None:
    """Attention errs by its bound; a value next to a tie behind it moves by a step of its row."""
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9)]):
        given = arguments(B, L, seed)
        expected = reference.int8_block(*given)
        assert_within(int8_block(*given), expected, 2e-2 * float(expected.abs().max()), seed=seed)
        x, operands = given
        no_attention = operands._replace(
            in_proj=PackedLinear(*(part * 0 for part in operands.in_proj if part is not None))
        )
        expected = reference.int8_block(x, no_attention)
        assert_same(int8_block(x, no_attention), expected, seed=seed)


def test_an_image_alone_and_in_a_batch() -> None:
    given = arguments(4, 7, 1, "gelu")
    x, operands = given
    x[2] = torch.nan
    whole = int8_block(x, operands)
    for i in (0, 1, 3):
        alone = int8_block(x[i : i + 1], operands)
        assert_same(alone, whole[i : i + 1], image=i)
        assert alone.isfinite().all()


@pytest.mark.parametrize("first_only", [False, True])
def test_seven_launches(first_only: bool) -> None:
    given = arguments(2, 5, 0)
    names = [launch.name for launch in launches_of(lambda: int8_block(*given, first_only))]
    assert names == [
        "layer_norm_quantize", "int8_linear", "int8_attention", "int8_linear",
        "layer_norm_quantize", "int8_linear", "int8_linear",
    ]  # fmt: skip
