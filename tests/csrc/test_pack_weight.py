"""The CPU layout of weights, against its definition written with reshape and permute."""

import pytest
import torch
from torch import Tensor

from lraee import ops
from tests.support import assert_same, generator

SHAPES = [(1, 1), (16, 4), (15, 3), (17, 5), (64, 64), (50, 197), (3, 1), (1, 9), (768, 768)]


def _layout(w_q: Tensor) -> Tensor:
    N, K = w_q.shape
    padded = torch.zeros(-(-N // 16) * 16, -(-K // 4) * 4, dtype=torch.int8)
    padded[:N, :K] = w_q
    return padded.view(-(-N // 16), 16, -(-K // 4), 4).permute(0, 2, 1, 3).contiguous()


def _weight(N: int, K: int) -> Tensor:
    return torch.randint(-128, 128, (N, K), generator=generator(N * 1000 + K), dtype=torch.int8)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_layout_and_sums(N: int, K: int) -> None:
    w_q = _weight(N, K)
    w, w_sum = ops.pack_weight(w_q)
    assert_same(w, _layout(w_q), N=N, K=K)
    assert_same(w_sum, w_q.sum(1, dtype=torch.int32), N=N, K=K)


@pytest.mark.parametrize(("N", "K"), [*SHAPES, (0, 5), (5, 0)])
def test_unpack_is_the_inverse(N: int, K: int) -> None:
    w_q = _weight(N, K)
    w, _ = ops.pack_weight(w_q)
    assert_same(ops.unpack_weight(w, N, K), w_q, N=N, K=K)


def test_a_weight_of_any_strides_is_packed_by_value() -> None:
    w_q = _weight(40, 33)
    w, w_sum = ops.pack_weight(w_q.t().contiguous().t())
    expected, expected_sum = ops.pack_weight(w_q)
    assert_same(w, expected)
    assert_same(w_sum, expected_sum)


def test_sum_of_extremes_is_exact() -> None:
    w_q = torch.full((2, 65_793), -128, dtype=torch.int8)
    _, w_sum = ops.pack_weight(w_q)
    assert w_sum.tolist() == [-128 * 65_793] * 2


def test_foreign_layouts_are_refused() -> None:
    w_q = _weight(32, 8)
    for call in (
        lambda: ops.unpack_weight(w_q, 32, 8),
        lambda: torch.ops.lraee.unpack_weight(w_q, 32, 8),
    ):
        with pytest.raises(ValueError, match=r"unpack_weight: w must .*\[2, 2, 16, 4\].*\[32, 8\]"):
            call()
    w, _ = ops.pack_weight(w_q)
    with pytest.raises(ValueError, match=r"unpack_weight: w must .*\[2, 3, 16, 4\]"):
        torch.ops.lraee.unpack_weight(w, 32, 12)
    with pytest.raises(TypeError, match="unpack_weight: w must be int8"):
        torch.ops.lraee.unpack_weight(w.float(), 32, 8)
