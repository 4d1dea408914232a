"""int8_linear in the interpreter: bit-equal without activation, bounded with one."""

import pytest
import torch

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned_all
from lraee.diagnostics.selftest_inputs import linear
from lraee.kernels import configs, workspace
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.operands import PackedLinear
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from tests.support import assert_same, assert_within

TINY = Config(16, 16, 32, num_warps=4, num_stages=3, group_m=2)
WIDE = Config(64, 64, 64, num_warps=4, num_stages=3)
SPLIT = Config(16, 32, 32, num_warps=4, num_stages=3, split_k=3)
SPLIT_WIDE = Config(64, 32, 64, num_warps=4, num_stages=3, split_k=2)

SHAPES = [
    (M, N, K, config)
    for M in (1, 2, 7, 16, 17, 33)
    for N, K in ((1, 1), (1, 64), (16, 2), (17, 31), (31, 65), (32, 96), (33, 97), (40, 130))
    for config in (TINY, WIDE, SPLIT, SPLIT_WIDE)
] + [
    (M, N, K, config)
    for M in (50, 197, 257)
    for N, K in ((48, 64), (35, 77))
    for config in (WIDE, SPLIT_WIDE)
]  # fmt: skip


def check(M: int, N: int, K: int, seed: int, config: Config | None, activation: str = "none") -> None:  # fmt: skip  # noqa: E501
    given = linear(M, N, K, seed)
    expected = reference.int8_linear(**given, activation=activation)
    guarded = poisoned_all(given, row_pad=seed % 3)
    with guarded_outputs():
        actual = int8_linear(**guarded, activation=activation, config=config)
    parameters = {"M": M, "N": N, "K": K, "seed": seed, "config": config, "act": activation}
    if activation == "none":
        assert_same(actual, expected, **parameters)
    else:
        assert actual.dtype == expected.dtype
        assert_within(actual, expected, bounds.of_linear(given, activation), **parameters)


def test_int8_linear() -> None:
    for seed, (M, N, K, config) in enumerate(SHAPES[::3]):
        check(M, N, K, seed, config)


@pytest.mark.slow
def test_int8_linear_every_shape() -> None:
    assert len(SHAPES) >= 200
    for seed, (M, N, K, config) in enumerate(SHAPES):
        check(M, N, K, seed + 1, config)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activations(activation: str) -> None:
    for seed, (M, N, K) in enumerate([(1, 33, 65), (17, 48, 96), (50, 40, 64), (3, 64, 200)] * 3):
        check(M, N, K, seed, WIDE, activation)


def test_config_is_chosen() -> None:
    for seed, (M, N, K) in enumerate([(1, 40, 70), (50, 64, 256), (70, 20, 130), (300, 8, 64)]):
        check(M, N, K, seed, None)


def test_tickets_are_zero_after_each_launch() -> None:
    check(17, 33, 200, 1, SPLIT)
    assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_no_rows_and_no_columns() -> None:
    for M, N, K in ((0, 5, 8), (5, 0, 8), (5, 3, 0)):
        given = linear(M, N, K, 15)
        assert_same(int8_linear(**given), reference.int8_linear(**given))


def test_w_with_another_layout_is_refused() -> None:
    given = linear(4, 8, 16, 0)
    given["linear"] = given["linear"]._replace(w=given["linear"].w.view(16, 8))
    with pytest.raises(AssertionError, match=r"w must have the CUDA layout \[8, 16\]"):
        int8_linear(**given)


# Old bugs of others (kernels.md)


def test_k_even_but_no_multiple_of_the_block() -> None:
    """EVEN_K once meant K % 2 == 0, and the last block was read past the row."""
    for K in (34, 66, 126):
        check(5, 16, K, 0, TINY)


def test_large_sums_do_not_pass_through_half() -> None:
    """acc * scale in float16 is infinite beyond 65,504: here acc = 127 * 127 * 512 = 8.3e6."""
    K = 512
    x_q, w = torch.full((1, K), 127, dtype=torch.int8), torch.full((16, K), 127, dtype=torch.int8)
    x_scale, w_scale = torch.tensor([0.01]), torch.full((16,), 0.001)
    linear = PackedLinear(w, w_scale, w.sum(1, dtype=torch.int32))
    y = int8_linear(x_q, x_scale, None, linear, out_dtype=torch.float16)
    product = torch.tensor(127.0 * 127 * K) * (torch.tensor(0.01) * torch.tensor(0.001))
    assert_same(y, product.to(torch.float16).expand(1, 16).contiguous())


# int8_linear_quantized


def check_quantized(M: int, N: int, K: int, seed: int, config: Config) -> None:
    """The same bits as int8_linear followed by quantize_rows."""
    symmetric = seed % 2 == 0
    given = linear(M, N, K, seed)
    if seed % 4 == 0 and given["linear"].bias is not None:
        given["linear"].bias[0] = torch.nan
    expected = reference.quantize_rows(reference.int8_linear(**given), symmetric)
    guarded = poisoned_all(given, row_pad=seed % 3)
    with guarded_outputs():
        actual = int8_linear_quantized(**guarded, symmetric=symmetric, config=config)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, M=M, N=N, K=K, seed=seed, config=config)


def test_int8_linear_quantized() -> None:
    for seed, (M, N, K, config) in enumerate(SHAPES[::3]):
        check_quantized(M, N, K, seed, config)


@pytest.mark.slow
def test_int8_linear_quantized_every_shape() -> None:
    for seed, (M, N, K, config) in enumerate(SHAPES):
        check_quantized(M, N, K, seed + 1, config)


@pytest.mark.parametrize("width", [20, 300])
def test_pieces_of_several_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows: several a piece, or one in several steps where they are long."""
    monkeypatch.setattr(configs, "PIECE_VALUES", 1)
    monkeypatch.setattr(configs, "MOST_SPREAD_ROWS", 0)
    for seed, config in enumerate([TINY, SPLIT, WIDE]):
        check_quantized(70, width, 40, seed, config)


def test_quantizing_no_rows_and_no_columns() -> None:
    for M, N, K in ((0, 5, 8), (5, 3, 0)):
        given = linear(M, N, K, 15)
        expected = reference.quantize_rows(reference.int8_linear(**given), False)
        actual = int8_linear_quantized(**given, symmetric=False)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, M=M)
