"""float_linear in C++: error bound, one fixed order in every tile, thread count and level."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import reference
from tests.support import EPS32, assert_same, assert_within, generator

_C = pytest.importorskip("lraee._C", reason="C++ extension not built (LRAEE_BUILD_EXT=0)")


@pytest.fixture(params=_C.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def _arguments(M: int, N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(seed)
    sizes = ((M, K), (N, K), (N,))
    x, w, bias = (torch.randn(size, generator=source) for size in sizes)
    return x, w, bias


SHAPES = [
    (M, N, K)
    for M in (0, 1, 2, 5, 12, 13, 49, 193)
    for N in (1, 15, 16, 17, 40)
    for K in (0, 1, 3, 64, 513)
]


def test_every_shape_is_within_the_bound(isa: str) -> None:
    for M, N, K in SHAPES:
        x, w, bias = _arguments(M, N, K, seed=M * 1000 + N * 10 + K)
        for b in (bias, None):
            y = ops.float_linear(x, w, b)
            exact = x.double() @ w.double().T + (0 if b is None else b.double())
            size = x.double().abs() @ w.double().abs().T + (0 if b is None else b.double().abs())
            assert_within(y, exact, (K + 1) * EPS32 * size * 1.001, isa=isa, M=M, N=N, K=K)


def test_all_levels_give_the_same_bits() -> None:
    for M, N, K in SHAPES:
        x, w, bias = _arguments(M, N, K, seed=7)
        results = []
        for level in _C.isa_levels():
            _C.set_isa(level)
            results.append(ops.float_linear(x, w, bias))
        _C.set_isa("")
        for y in results[1:]:
            assert_same(y, results[0], M=M, N=N, K=K)


def test_each_row_has_the_same_bits_in_any_batch(isa: str) -> None:
    x, w, bias = _arguments(200, 40, 600)
    whole = ops.float_linear(x, w, bias)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 16), slice(199, 200), slice(60, 160)):
        assert_same(ops.float_linear(x[rows], w, bias), whole[rows], isa=isa, rows=rows)


def test_threads_do_not_change_a_bit() -> None:
    for M in (1, 49, 400):
        x, w, bias = _arguments(M, 70, 130)
        results = []
        threads = torch.get_num_threads()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.float_linear(x, w, bias))
        torch.set_num_threads(threads)
        assert_same(results[1], results[0], M=M)
        assert_same(results[2], results[0], M=M)


def test_strided_rows_and_columns(isa: str) -> None:
    x, w, bias = _arguments(30, 20, 50)
    expected = ops.float_linear(x, w, bias)
    wide = torch.zeros(30, 99)
    wide[:, 7:57] = x
    assert_same(ops.float_linear(wide[:, 7:57], w, bias), expected, isa=isa)
    assert_same(ops.float_linear(x.T.contiguous().T, w, bias), expected, isa=isa)
    tall = torch.zeros(50, 33)
    tall[:, 5:25] = w.T
    for same in (w.T.contiguous().T, tall[:, 5:25].T):
        assert_same(ops.float_linear(x, same, bias), expected, isa=isa)


def test_the_reference_is_within_the_same_bound() -> None:
    x, w, bias = _arguments(9, 11, 300)
    y = reference.float_linear(x, w, bias)
    # Unfused: two roundings for each step instead of one.
    size = x.double().abs() @ w.double().abs().T + bias.double().abs()
    assert_within(y, x.double() @ w.double().T + bias.double(), 2 * 301 * EPS32 * size)


def test_nan_in_one_row_touches_no_other(isa: str) -> None:
    x, w, bias = _arguments(14, 20, 33)
    clean = ops.float_linear(x, w, bias)
    x[5, 3] = torch.nan
    spoilt = ops.float_linear(x, w, bias)
    assert spoilt[5].isnan().all()
    others = torch.arange(14) != 5
    assert_same(spoilt[others], clean[others], isa=isa)
