"""int8_block in the interpreter: the definition's block; seven launches or nine, the same bits."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.launches import launches_of
from lraee import block, selftest_inputs
from lraee.kernels import int8_block as module
from lraee.kernels.int8_block import int8_block
from tests.support import assert_same, assert_within

H, D = 2, 32


def arguments(B: int, L: int, seed: int, activation: str = "none") -> list[Any]:
    return [*selftest_inputs.block(B, L, H, D // H, seed, torch.device("cpu"))[:-1], activation]


def by(launches: int, given: list[Any], *, first_only: bool = False) -> Tensor:
    with mock.patch.object(module, "quantizes_together", lambda M, arch: launches == 7):
        return int8_block(*given, first_only=first_only)


def test_seven_launches_or_nine_the_same_bits() -> None:
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9), (1, 50)]):
        given = arguments(B, L, seed, "quick_gelu" if seed == 2 else "none")
        assert_same(by(7, given), by(9, given), seed=seed)


@pytest.mark.parametrize("launches", [7, 9])
def test_the_first_token_alone_has_its_bits(launches: int) -> None:
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9)]):
        given = arguments(B, L, seed, "gelu" if seed == 2 else "none")
        whole = by(launches, given)
        assert_same(by(launches, given, first_only=True), whole[:, :1], seed=seed)


def test_it_is_the_block() -> None:
    """Attention errs by its bound; a value next to a tie behind it moves by a step of its row."""
    for seed, (B, L) in enumerate([(1, 1), (2, 5), (1, 17), (3, 9)]):
        given = arguments(B, L, seed)
        expected = block.int8_block(*given)
        assert_within(by(9, given), expected, 2e-2 * float(expected.abs().max()), seed=seed)
        one = [*given]
        one[2] = [None if part is None else part * 0 for part in given[2]]  # no attention at all
        assert_same(by(9, one), block.int8_block(*one), seed=seed)


def test_an_image_alone_and_in_a_batch() -> None:
    given = arguments(4, 7, 1, "gelu")
    given[0][2] = torch.nan
    whole = int8_block(*given)
    for i in (0, 1, 3):
        alone = int8_block(given[0][i : i + 1], *given[1:])
        assert_same(alone, whole[i : i + 1], image=i)
        assert alone.isfinite().all()


@pytest.mark.parametrize("launches", [7, 9])
def test_launches(launches: int) -> None:
    given = arguments(2, 5, 0)
    names = [launch.name for launch in launches_of(lambda: by(launches, given))]
    assert len(names) == launches
    assert names.count("quantize_rows") == launches - 7
