"""float_linear in the interpreter: within its bound, the same bits by any tiling, row by row."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned
from lraee.diagnostics.selftest_inputs import float_linear as inputs
from lraee.kernels import workspace
from lraee.kernels.float_configs import SEGMENT_K, FloatConfig, float_config
from lraee.kernels.float_linear import float_linear
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from tests.support import assert_same, assert_within

TINY = FloatConfig(16, 16, 32, num_warps=4, num_stages=3)
SHAPES = [
    (M, N, K)
    for M in (1, 2, 7, 16, 17, 33, 50, 70)
    for N, K in (
        (1, 1),
        (16, 2),
        (17, 31),
        (31, 65),
        (32, 96),
        (33, 97),
        (40, 130),
        (3, SEGMENT_K),
        (20, SEGMENT_K + 1),
        (5, 2 * SEGMENT_K - 40),
        (9, 3 * SEGMENT_K),
    )
] + [(M, N, K) for M in (197, 257) for N, K in ((48, 64), (35, 77), (7, SEGMENT_K + 65))]
# fmt: skip


def definition(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y = reference.float_linear(x.float(), w.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def check(M: int, N: int, K: int, seed: int, config: FloatConfig | None = None) -> None:
    x, w, bias = inputs(M, N, K, seed)
    segments = -(-K // SEGMENT_K)
    with guarded_outputs():
        built = [
            float_linear(poisoned(x, (0, 16, 3)[seed % 3]), w, bias, config=config, splits=splits)
            for splits in {1, segments}
        ]
    bound = bounds.of_float_linear(x, w, bias)
    for y in built:
        assert_within(y, definition(x, w, bias), bound, M=M, N=N, K=K, seed=seed)
        assert_same(y, built[0], M=M, N=N, K=K, seed=seed)


def test_float_linear() -> None:
    for seed, shape in enumerate(SHAPES[::4]):
        check(*shape, seed, TINY)


@pytest.mark.slow
def test_float_linear_every_shape() -> None:
    shapes = SHAPES * 3
    assert len(shapes) >= 200
    for seed, shape in enumerate(shapes):
        check(*shape, seed, TINY if seed % 2 else None)


@pytest.mark.usefixtures("fixed_order_of_sums")
def test_tilings_make_the_same_sums() -> None:
    for seed in range(3):
        x, w, bias = inputs(130, 70, SEGMENT_K + 40, seed)
        own = float_config(x.shape[1], x.element_size())
        others = [replace(own, block_m=m, block_n=n) for m, n in ((128, 64), (16, 128))]
        result = [float_linear(x, w, bias, config=config) for config in (own, *others)]
        for y in result:
            assert_same(y, result[0], seed=seed)


@pytest.mark.usefixtures("fixed_order_of_sums")
def test_a_row_alone_and_in_any_batch() -> None:
    x, w, bias = inputs(70, 33, SEGMENT_K + 33, 1)
    x[5] = torch.nan
    whole = float_linear(x, w, bias)
    for first, last in ((0, 1), (4, 5), (6, 70)):
        assert_same(float_linear(x[first:last], w, bias), whole[first:last], rows=(first, last))
        assert whole[first:last].isfinite().all()
    assert whole[5].isnan().all()


def test_tickets_are_zero_after_each_launch() -> None:
    check(17, 33, SEGMENT_K + 1, 1)
    assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_no_rows_no_columns_and_no_terms() -> None:
    for M, N, K in ((0, 5, 8), (5, 0, 8), (5, 3, 0)):
        x, w, bias = inputs(M, N, K, 1)
        assert_same(float_linear(x, w, bias), definition(x, w, bias))


def test_w_of_another_type_is_refused() -> None:
    x, w, _ = inputs(2, 3, 4, 1)
    with pytest.raises(AssertionError, match="float_linear: w must be"):
        float_linear(x, w.double())
