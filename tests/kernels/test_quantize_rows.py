"""quantize_rows and layer_norm_quantize in the interpreter: bit-equal to the definition."""

import pytest
import torch

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned
from lraee.diagnostics.selftest_inputs import TYPES, rows_with_extremes
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows
from lraee.kernels.row_configs import RowConfig
from lraee.ops import reference
from tests.support import assert_same

SHAPES = [
    (M, K)
    for M in (1, 2, 3, 5, 8, 17)
    for K in (1, 2, 3, 15, 16, 31, 33, 63, 64, 65, 77, 96, 127, 128, 129, 191, 200, 255, 257, 320)
]
TALL = [(50, 48), (197, 40), (257, 33), (50, 768), (3, 4096), (2, 4097), (1, 5000)]


def check_quantize(M: int, K: int, seed: int, config: RowConfig | None = None) -> None:
    dtype, symmetric = TYPES[seed % 3], seed % 2 == 0
    x = poisoned(rows_with_extremes(M, K, seed).to(dtype), row_pad=seed % 4)
    with guarded_outputs():
        actual = quantize_rows(x, symmetric, config=config)
    for value, expected in zip(actual, reference.quantize_rows(x, symmetric), strict=True):
        assert_same(value, expected, M=M, K=K, seed=seed, dtype=dtype, symmetric=symmetric)


def check_layer_norm(M: int, D: int, seed: int, config: RowConfig | None = None) -> None:
    dtype, symmetric = TYPES[seed % 3], seed % 2 == 0
    x = poisoned(rows_with_extremes(M, D, seed).to(dtype), row_pad=seed % 4)
    gamma, beta = poisoned(torch.randn(D)), poisoned(torch.randn(D))
    eps = (1e-5, 1e-6, 0.1)[seed % 3]
    with guarded_outputs():
        actual = layer_norm_quantize(x, gamma, beta, eps, symmetric, config=config)
    expected = reference.layer_norm_quantize(x, gamma, beta, eps, symmetric)
    for value, wanted in zip(actual, expected, strict=True):
        assert_same(value, wanted, M=M, D=D, seed=seed, dtype=dtype, symmetric=symmetric)


def test_quantize_rows() -> None:
    for seed, (M, K) in enumerate(SHAPES + TALL):
        check_quantize(M, K, seed, RowConfig(8 if M < 50 else 64, num_warps=4))


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [1, 4])
def test_quantize_rows_in_smaller_programs(block_m: int) -> None:
    for seed, (M, K) in enumerate(SHAPES + TALL):
        check_quantize(M, K, seed + 1, RowConfig(block_m, num_warps=4))


def test_quantize_rows_chooses_a_config() -> None:
    for seed, (M, K) in enumerate([(1, 7), (5, 768), (513, 12)]):
        check_quantize(M, K, seed)


def test_layer_norm_quantize() -> None:
    for seed, (M, D) in enumerate(SHAPES[::2] + TALL):
        check_layer_norm(M, D, seed, RowConfig(8 if M < 50 else 64, num_warps=4))


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [1, 4])
def test_layer_norm_quantize_every_shape(block_m: int) -> None:
    for seed, (M, D) in enumerate(SHAPES + TALL):
        check_layer_norm(M, D, seed + 1, RowConfig(block_m if M < 50 else 16, num_warps=4))


def test_layer_norm_quantize_chooses_a_config() -> None:
    for seed, (M, D) in enumerate([(1, 7), (3, 768), (513, 12)]):
        check_layer_norm(M, D, seed)


def test_every_tie_rounds_to_even() -> None:
    # Scale 2 exactly, so that odd values lie on ties: -1 / 2 -> -0, 1 / 2 -> 0, 3 / 2 -> 2, …
    x = torch.arange(-254.0, 255.0)[None, :]
    x_q, x_scale, _ = quantize_rows(x, True)
    assert x_scale.item() == 2.0
    assert_same(x_q[0].float(), torch.round(x[0] / 2))


def test_no_rows() -> None:
    for x in (torch.empty(0, 5), torch.empty(3, 0)):
        for value, expected in zip(
            quantize_rows(x, False), reference.quantize_rows(x, False), strict=True
        ):
            assert_same(value, expected)


def test_columns_with_a_stride() -> None:
    x = torch.randn(10, 7).t()
    for value, expected in zip(
        quantize_rows(x, True), reference.quantize_rows(x, True), strict=True
    ):
        assert_same(value, expected)
