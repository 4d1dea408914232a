"""int8_block in the interpreter: its launches, and the bits of its operators one by one."""

import pytest
import torch
from torch import Tensor

from bench.launches import launches_of
from lraee.diagnostics import selftest_cases, selftest_inputs
from lraee.kernels import live_rows, row_configs
from lraee.kernels.int8_block import int8_block
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.operands import BlockOperands, PackedLinear
from lraee.ops import reference
from tests.support import assert_same, assert_within

H, D = 2, 32


def arguments(
    B: int, L: int, seed: int, activation: str = "none", attention: str = "float"
) -> tuple[Tensor, BlockOperands]:
    x, operands = selftest_inputs.block(B, L, H, D // H, seed, torch.device("cpu"))
    return x, operands._replace(activation=activation, attention=attention)


def one_by_one(x: Tensor, operands: BlockOperands, *, first_only: bool = False) -> Tensor:
    """The block by launchers that quantize rows in a launch of their own."""
    launchers = selftest_cases.launchers()
    return reference.int8_block(x, operands, first_only, operators=launchers)


attentions = pytest.mark.parametrize("attention", ["float", "int8"])


@pytest.mark.parametrize(("attention", "few_rows"), [("float", 512), ("float", 0), ("int8", 512)])
def test_the_bits_of_its_operators_one_by_one(
    attention: str, few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized in the launches that make rows, or after them."""
    monkeypatch.setattr(row_configs, "FEW_ROWS", few_rows)
    shapes = [(1, 1), (2, 5), (1, 17)] if (attention, few_rows) == ("float", 512) else [(2, 5)]
    for seed, (B, L) in enumerate(shapes):
        given = arguments(B, L, seed, "quick_gelu" if seed == 2 else "none", attention)
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
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17)]):
        given = arguments(B, L, seed, "gelu" if seed == 2 else "none")
        assert_same(int8_block(*given, first_only=True), int8_block(*given)[:, :1], seed=seed)


@attentions
def test_it_is_the_block(attention: str) -> None:
    """Attention errs by its bound; a value next to a tie behind it moves by a step of its row."""
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17)]):
        given = arguments(B, L, seed, attention=attention)
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


def test_images_that_left_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the others, however many are left, in both forms of a block."""
    given = arguments(3, 5, 1, "gelu")
    expected = int8_block(*given)
    for few_rows in (512, 0):
        monkeypatch.setattr(row_configs, "FEW_ROWS", few_rows)
        for images in range(4):
            with live_rows.using(LiveRows(torch.tensor([images], dtype=torch.int32), 3)):
                assert_same(int8_block(*given)[:images], expected[:images], images=images)


NORM, LINEAR, QUANTIZE = "layer_norm_quantize", "int8_linear", "quantize_rows"


@pytest.mark.parametrize("first_only", [False, True])
def test_launches(first_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of few rows; nine of many; int8 attention quantizes nothing in its launch."""
    for attention, few_rows, expected in (
        ("float", 512, [NORM, LINEAR, "float_attention", LINEAR, NORM, LINEAR, LINEAR]),
        ("float", 0, [NORM, LINEAR, "float_attention", QUANTIZE, LINEAR, NORM, LINEAR, QUANTIZE,
                      LINEAR]),
        ("int8", 512, [NORM, LINEAR, "int8_attention", QUANTIZE, LINEAR, NORM, LINEAR, LINEAR]),
    ):  # fmt: skip
        monkeypatch.setattr(row_configs, "FEW_ROWS", few_rows)
        given = arguments(2, 5, 0, attention=attention)
        names = [launch.name for launch in launches_of(lambda: int8_block(*given, first_only))]  # noqa: B023
        assert names == expected
