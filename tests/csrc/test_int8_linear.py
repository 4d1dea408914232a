"""int8_linear on the CPU, each instruction-set level by name, against the exact integer product."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lraee import _C, ops
from lraee.ops import PackedLinear, reference
from tests.support import EPS32, HALF_STEP, assert_same, assert_within, generator, quantized_linear

LEVELS = _C.isa_levels()
FIXED_M = [0, 1, 2, 5, 6, 7, 13, 17, 50, 197]
FIXED_N = [1, 8, 15, 16, 17, 63, 65, 100]
FIXED_K = [0, 1, 2, 3, 4, 7, 31, 64, 99]
ACTIVATION_BOUND = {"gelu": 2.6e-07, "gelu_tanh": 3.9e-07, "quick_gelu": 1.6e-06}
"""Absolute error of the part below zero, every rounding counted (csrc/cpu/numerics/gates.h)."""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny products, where waking a second thread is most of the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _int8(rows: int, columns: int, source: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), generator=source, dtype=torch.int8)


def _assert_exact(M: int, N: int, K: int, source: torch.Generator, *, level: str) -> None:
    """One product with unit scales, so that y shows the int32 sums, against int64 arithmetic."""
    x_q, w_q = _int8(M, K, source), _int8(N, K, source)
    x_zero = torch.randint(-128, 128, (M,), generator=source, dtype=torch.int32)
    w, w_sum = torch.ops.lraee.pack_weight(w_q)
    y = torch.ops.lraee.int8_linear(x_q, torch.ones(M), x_zero, w, torch.ones(N), w_sum)
    expected = (x_q.double() - x_zero[:, None]) @ w_q.double().T
    assert expected.numel() == 0 or expected.abs().max() < 2**24
    if not torch.equal(y.double(), expected):
        assert_same(y, expected.float(), M=M, N=N, K=K, level=level)


@pytest.mark.usefixtures("one_thread")
def test_fixed_shapes_are_exact(level: str) -> None:
    source = generator(1)
    for M, N, K in itertools.product(FIXED_M, FIXED_N, FIXED_K):
        _assert_exact(M, N, K, source, level=level)


@pytest.mark.usefixtures("one_thread")
def test_random_shapes_are_exact(level: str) -> None:
    source = generator(2)
    sizes = torch.randint(1, 90, (5000, 3), generator=source)
    for M, N, K in sizes.tolist():
        _assert_exact(M, N, K, source, level=level)


@pytest.mark.parametrize(("M", "N", "K"), [(50, 768, 768), (197, 200, 3072), (400, 130, 1024)])
def test_shapes_of_real_layers_are_exact(level: str, M: int, N: int, K: int) -> None:
    """Several chunks of rows, several panels, and K where rows are spread in the L1 cache."""
    case = quantized_linear(M, N, K, seed=3)
    w, w_sum = ops.pack_weight(case["w_q"])
    ones = torch.ones
    y = ops.int8_linear(case["x_q"], ones(M), case["x_zero"], PackedLinear(w, ones(N), w_sum))
    expected = (case["x_q"].double() - case["x_zero"][:, None]) @ case["w_q"].double().T
    assert_same(y, expected.float(), M=M, N=N, K=K, level=level)


@pytest.mark.parametrize("x_value", [-128, 127])
@pytest.mark.parametrize("w_value", [-128, 127])
@pytest.mark.parametrize("zero", [None, -128, 127])
def test_extremes_at_the_longest_k(
    level: str, x_value: int, w_value: int, zero: int | None
) -> None:
    M, N, K = 2, 3, reference.MAX_K
    x_q = torch.full((M, K), x_value, dtype=torch.int8)
    w, w_sum = ops.pack_weight(torch.full((N, K), w_value, dtype=torch.int8))
    x_zero = None if zero is None else torch.full((M,), zero, dtype=torch.int32)
    y = ops.int8_linear(x_q, torch.ones(M), x_zero, PackedLinear(w, torch.ones(N), w_sum))
    total = (x_value - (zero or 0)) * w_value * K
    assert -(2**31) <= total < 2**31
    assert_same(y, torch.full((M, N), total, dtype=torch.int32).float(), level=level)


def test_neighbouring_extremes_do_not_saturate(level: str) -> None:
    """255 * 127 * 2 and 255 * 128 * 2 do not fit the int16 of vpmaddubsw."""
    case = quantized_linear(13, 33, 47, extremes=True)
    w, w_sum = ops.pack_weight(case["w_q"])
    y = ops.int8_linear(case["x_q"], torch.ones(13), None, PackedLinear(w, torch.ones(33), w_sum))
    assert_same(y, (case["x_q"].double() @ case["w_q"].double().T).float(), level=level)


def _operands(case: dict[str, Tensor], out_dtype: torch.dtype, parts: str) -> dict[str, Tensor]:
    """The optional operands whose first letter is in parts: (z)ero, (b)ias, (r)esidual, (l)ayer."""
    return {
        "x_zero": case["x_zero"] if "z" in parts else None,
        "bias": case["bias"] if "b" in parts else None,
        "residual": case["residual"].to(out_dtype) if "r" in parts else None,
        "layer_scale": case["layer_scale"] if "l" in parts else None,
    }


def _both(
    case: dict[str, Tensor], *, parts: str, activation: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """int8_linear by the level in force and by the reference."""
    options = {"activation": activation, "out_dtype": out_dtype}
    operands = _operands(case, out_dtype, parts)
    x_zero, residual = operands.pop("x_zero"), operands.pop("residual")
    w, w_sum = ops.pack_weight(case["w_q"])
    inputs = case["x_q"], case["x_scale"], x_zero
    linear = PackedLinear(w, case["w_scale"], w_sum, **operands)
    y = ops.int8_linear(*inputs, linear, residual=residual, **options)
    plain = linear._replace(w=case["w_q"])
    return y, reference.int8_linear(*inputs, plain, residual=residual, **options)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", ["", "z", "zb", "zbr", "bl", "zblr"])
def test_epilogue_equals_the_reference_bit_for_bit(
    level: str, parts: str, out_dtype: torch.dtype
) -> None:
    for M, N, K in [(1, 1, 1), (17, 37, 50), (50, 96, 64), (0, 5, 4)]:
        case = quantized_linear(M, N, K, seed=4)
        y, expected = _both(case, parts=parts, activation="none", out_dtype=out_dtype)
        assert_same(y, expected, M=M, N=N, K=K, parts=parts, level=level)


def _exact_activation(y: Tensor, activation: str) -> Tensor:
    """The activation of float64."""
    if activation == "gelu":
        return 0.5 * y * torch.erfc(-y / math.sqrt(2.0))
    if activation == "gelu_tanh":
        return y * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3))
    return y * torch.sigmoid(1.702 * y)


def _through_activation(values: Tensor, activation: str, out_dtype: torch.dtype) -> Tensor:
    """act(values): an empty product with the values as its bias."""
    N = values.numel()
    w, w_sum = ops.pack_weight(torch.zeros(N, 1, dtype=torch.int8))
    x_q = torch.zeros(1, 1, dtype=torch.int8)
    return ops.int8_linear(
        x_q, torch.ones(1), None, PackedLinear(w, torch.ones(N), w_sum, values),
        activation=activation, out_dtype=out_dtype,
    )[0]  # fmt: skip


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", list(ACTIVATION_BOUND))
def test_activation_keeps_its_bound(level: str, activation: str, out_dtype: torch.dtype) -> None:
    values = torch.cat(
        [torch.linspace(-20, 20, 40_001), torch.tensor([0.0, -0.0, 1e-30, 3e4, -3e4])]
    )
    y = _through_activation(values, activation, out_dtype)
    expected = _exact_activation(values.double(), activation)
    # The bound of the polynomial, one rounding of max(y, 0) minus it, one to the output type.
    half_step = HALF_STEP[out_dtype] if out_dtype is not torch.float32 else 0.0
    smallest = 2.0**-25 if out_dtype is torch.float16 else 0.0
    bound = ACTIVATION_BOUND[activation] * (1 + half_step) + expected.abs() * (EPS32 + half_step)
    assert_within(y, expected, bound + smallest, level=level, activation=activation)


@pytest.mark.parametrize("activation", list(ACTIVATION_BOUND))
def test_activation_of_infinity_and_nan(level: str, activation: str) -> None:
    y = _through_activation(
        torch.tensor([math.inf, -math.inf, math.nan]), activation, torch.float32
    )
    assert y[0] == math.inf
    assert abs(y[1].item()) <= ACTIVATION_BOUND[activation]
    assert y[2].isnan()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", list(ACTIVATION_BOUND))
def test_all_levels_agree_bit_for_bit(activation: str, out_dtype: torch.dtype) -> None:
    case = quantized_linear(37, 83, 61, seed=5)
    results = {}
    for name in LEVELS:
        _C.set_isa(name)
        results[name], _ = _both(case, parts="zblr", activation=activation, out_dtype=out_dtype)
    _C.set_isa("")
    for name, y in results.items():
        assert_same(y, results["scalar"], level=name, activation=activation)


def test_half_conversions_at_every_level(level: str) -> None:
    """Ties, subnormals, overflow, infinities: through the bias, against torch's conversion."""
    source = generator(6)
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=source, dtype=torch.int64)
    edges = torch.arange(0, 2**16, 7, dtype=torch.int64) << 16 | 0x1000
    values = torch.cat([bits, edges, edges - 1, edges + 0x7000]).to(torch.int32).view(torch.float32)
    small = torch.randn(20_000, generator=source) * 10.0 ** torch.linspace(-8, 5, 20_000)
    values = torch.cat([values, small])
    for dtype in (torch.bfloat16, torch.float16):
        y = _through_activation(values, "none", dtype)
        assert_same(y, values.to(dtype), level=level, dtype=dtype)


def test_rows_may_have_any_stride(level: str) -> None:
    source = generator(7)
    M, N, K = 19, 35, 23
    wide, residual = _int8(M, 3 * K, source), torch.randn(N, M, generator=source).t()
    case = quantized_linear(M, N, K)
    w, w_sum = ops.pack_weight(case["w_q"])
    x_q = wide[:, K : 2 * K]
    for rows in (x_q, x_q[:1].expand(M, K), x_q.flip(0)[::2][:1].expand(M, K)):
        inputs = rows, case["x_scale"], case["x_zero"]
        linear = PackedLinear(w, case["w_scale"], w_sum)
        y = ops.int8_linear(*inputs, linear, residual=residual)
        plain = linear._replace(w=case["w_q"])
        expected = reference.int8_linear(*inputs, plain, residual=residual)
        assert_same(y, expected, level=level, stride=rows.stride())


def test_nothing_is_written_or_read_beyond_the_rows(level: str) -> None:
    """Poison around x_q must not reach y; a column range of a wider matrix shows it."""
    M, N, K = 7, 21, 5
    case = quantized_linear(M, N, K, seed=8)
    w, w_sum = ops.pack_weight(case["w_q"])
    results = []
    for poison in (-128, 127):
        wide = torch.full((M, K + 8), poison, dtype=torch.int8)
        wide[:, :K] = case["x_q"]
        results.append(
            ops.int8_linear(
                wide[:, :K], case["x_scale"], None, PackedLinear(w, case["w_scale"], w_sum)
            )
        )
    assert_same(results[0], results[1], level=level)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_row_has_the_same_bits_in_any_batch_and_thread_count(level: str, activation: str) -> None:
    N, K = 150, 96
    case = quantized_linear(211, N, K, seed=9)
    w, w_sum = ops.pack_weight(case["w_q"])

    def compute(rows: slice) -> Tensor:
        return ops.int8_linear(
            case["x_q"][rows], case["x_scale"][rows], case["x_zero"][rows],
            PackedLinear(w, case["w_scale"], w_sum, case["bias"]), activation=activation,
        )  # fmt: skip

    num_threads = torch.get_num_threads()
    whole = compute(slice(None))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(compute(slice(None)), whole, threads=threads)
            for start, stop in ((0, 1), (5, 6), (210, 211), (3, 20), (100, 211)):
                assert_same(compute(slice(start, stop)), whole[start:stop], threads=threads)
    finally:
        torch.set_num_threads(num_threads)


def test_a_nan_scale_spoils_its_own_row_only(level: str) -> None:
    case = quantized_linear(8, 40, 33, seed=10)
    clean, _ = _both(case, parts="zb", activation="gelu", out_dtype=torch.float32)
    case["x_scale"][3] = math.nan
    y, _ = _both(case, parts="zb", activation="gelu", out_dtype=torch.float32)
    assert y[3].isnan().all()
    keep = torch.arange(8) != 3
    assert_same(y[keep], clean[keep], level=level)


def test_foreign_layouts_are_refused_below_the_door() -> None:
    """The operator itself checks what memory safety needs."""
    case = quantized_linear(4, 32, 8)
    w, w_sum = ops.pack_weight(case["w_q"])
    op = torch.ops.lraee.int8_linear
    scales = case["x_scale"], None
    with pytest.raises(
        ValueError, match=r"int8_linear: w must have the cpu layout \[2, 2, 16, 4\]"
    ):
        op(case["x_q"], *scales, case["w_q"], case["w_scale"], w_sum)
    with pytest.raises(ValueError, match="int8_linear: w must have the cpu layout"):
        op(case["x_q"], *scales, w.transpose(2, 3), case["w_scale"], w_sum)
    with pytest.raises(ValueError, match="int8_linear: x_q must have shape .* contiguous rows"):
        op(case["x_q"].t().contiguous().t(), *scales, w, case["w_scale"], w_sum)
    with pytest.raises(ValueError, match=r"int8_linear: w_sum must have shape \[32\], got \[31\]"):
        op(case["x_q"], *scales, w, case["w_scale"], w_sum[:31])
    with pytest.raises(ValueError, match=r"int8_linear: residual must be"):
        op(case["x_q"], *scales, w, case["w_scale"], w_sum, residual=torch.zeros(4, 31))
    with pytest.raises(ValueError, match="int8_linear: activation must be .*, got swish"):
        op(case["x_q"], *scales, w, case["w_scale"], w_sum, activation="swish")
