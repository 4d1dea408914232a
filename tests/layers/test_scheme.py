"""Schemes, weights, and the numerics of torch's own dynamic quantization."""

import pytest
import torch
from torch import nn

from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import (
    INT8,
    PAPER,
    Scheme,
    channel_copies,
    find_scheme,
    quantize_activation,
    quantize_batch,
    quantize_weight,
)
from lraee.ops import reference
from tests.support import EPS32, assert_same, assert_within, generator

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]


@pytest.fixture(params=ENGINES)
def engine(request):
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


# Schemes


def test_named_schemes():
    assert find_scheme("int8") == Scheme() == INT8
    assert find_scheme("paper") is PAPER
    assert find_scheme(PAPER) is PAPER


def test_unknown_scheme_names_the_choices():
    with pytest.raises(
        ValueError,
        match=r"scheme must be one of int8, int8-patches, int8-calibrated, paper or a Scheme"
        r", got 'i'",
    ):
        find_scheme("i")
    with pytest.raises(TypeError, match="scheme must be a str or a Scheme, got int"):
        find_scheme(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "row"}, "weights must be one of channel, tensor, got 'row'"),
        ({"activations": "row"}, "activations must be one of token, batch, got 'row'"),
        ({"attention": "fp8"}, "attention must be one of auto, int8, float, got 'fp8'"),
        (
            {"calibration": "photos"},
            "calibration must be empty, 'images' or a sha256, got 'photos'",
        ),
        ({"symmetric": ("qkv",)}, "symmetric must be one of in_proj, out_proj, c_fc, c_proj"),
    ],
)
def test_scheme_refuses(options, message):
    with pytest.raises(ValueError, match=f"Scheme: {message}"):
        Scheme(**options)


def test_attention_is_the_devices_own():
    """Of a scheme that names none."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert INT8.attention == "auto"
    assert INT8.on(cpu) == Scheme(attention="int8")
    assert INT8.on(gpu) == Scheme(attention="float")
    for kind in ("int8", "float"):
        assert Scheme(attention=kind).on(cpu) == Scheme(attention=kind).on(gpu)
    assert PAPER.on(gpu) == PAPER.on(cpu) == PAPER


def test_granularity_by_site():
    scheme = Scheme(symmetric=("c_fc",))
    assert scheme.granularity("c_fc") == "row_symmetric"
    assert scheme.granularity("c_proj") == "row"


# Weights


def test_weight_per_channel_by_hand():
    weight = torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.03]])
    w_q, w_scale = quantize_weight(weight, INT8)
    assert_same(w_q, torch.tensor([[127, -1, 0], [0, 0, 0], [-127, 64, 2]], dtype=torch.int8))
    assert_within(w_scale, torch.tensor([1.0, 1.0, 0.02]), 0.02 * 2 * EPS32)


def test_weight_per_tensor_is_that_of_torch():
    weight = torch.randn(33, 70, generator=generator(1))
    linear = nn.Linear(70, 33)
    linear.weight = nn.Parameter(weight)
    theirs = _torch_dynamic(linear).weight()
    w_q, w_scale = quantize_weight(weight, PAPER)
    assert_same(w_q, theirs.int_repr())
    assert_same(w_scale, torch.full((33,), theirs.q_scale()))
    assert theirs.q_zero_point() == 0


@pytest.mark.parametrize("scheme", [INT8, PAPER, Scheme(clip_weights=True)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_must_be_finite(scheme, bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight must be finite, got NaN or Inf"):
        quantize_weight(weight, scheme)


def test_clipping_lowers_the_error_of_each_row():
    """One outlier m among K = 20,000: with the range clipped to r m the squared error is about
    K (r m / 127)^2 / 12 + ((1 - r) m)^2, least at r = 0.907 and 9 % lower there than at r = 1."""
    weight = torch.randn(4, 20_000, generator=generator(2)).clamp(-3, 3)
    weight[:, 7] = 30.0
    plain = _weight_error(weight, Scheme())
    clipped = _weight_error(weight, Scheme(clip_weights=True))
    assert (clipped < 0.93 * plain).all()
    ordinary = torch.randn(20, 400, generator=generator(2))
    assert (
        _weight_error(ordinary, Scheme(clip_weights=True)) <= _weight_error(ordinary, INT8)
    ).all()


def _weight_error(weight, scheme):
    w_q, w_scale = quantize_weight(weight, scheme)
    assert w_q.abs().max() <= 127
    return (w_q * w_scale[:, None] - weight).square().sum(1)


# Activations


def test_activation_rows_are_the_operator():
    x = torch.randn(7, 19, generator=generator(3))
    for granularity, symmetric in (("row", False), ("row_symmetric", True)):
        result = quantize_activation(x, granularity, "auto")
        for actual, expected in zip(result, reference.quantize_rows(x, symmetric), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_batch_step_and_zero_are_those_of_torch(seed, reduce_range):
    source = generator(seed)
    spread = 10.0 ** torch.empty(()).uniform_(-9, 6, generator=source)
    x = (torch.randn(5, 8, generator=source) + 3 * torch.randn((), generator=source)) * spread
    scale, zero = torch._choose_qparams_per_tensor(x, reduce_range)
    _, x_scale, x_zero = quantize_batch(x, reduce_range=reduce_range)
    assert_same(x_scale, torch.full((5,), scale), spread=spread)
    assert_same(x_zero, torch.full((5,), zero - 128, dtype=torch.int32), spread=spread)


def test_batch_by_hand():
    x_q, x_scale, x_zero = quantize_batch(torch.tensor([[-1.0, 0.0], [0.5, 1.55]]), reduce_range=0)
    assert_same(x_scale, torch.full((2,), 0.01))
    assert_same(x_zero, torch.full((2,), 100 - 128, dtype=torch.int32))
    assert_same(x_q, torch.tensor([[-128, -28], [22, 127]], dtype=torch.int8))


def test_batch_of_zeros_and_of_nothing():
    x_q, x_scale, x_zero = quantize_batch(torch.zeros(2, 3), reduce_range=True)
    assert ((x_q - x_zero[:, None]) * x_scale[:, None] == 0).all()
    assert quantize_batch(torch.zeros(0, 3), reduce_range=True)[0].shape == (0, 3)


def test_batch_with_nan_is_nan_in_every_row():
    x = torch.ones(3, 4)
    x[1, 1] = float("nan")
    x_q, x_scale, x_zero = quantize_batch(x, reduce_range=True)
    assert x_scale.isnan().all() and not x_q.any() and not x_zero.any()


@pytest.mark.parametrize("seed", range(5))
def test_paper_linear_is_that_of_torch(engine, seed):
    """Integers equal: their difference to torch's output is float rounding alone.

    y = (acc - zero) * (x_scale * w_scale) + bias takes three roundings here; torch's engines
    take up to three of their own, in another order. Each is at most EPS32 of the largest term.
    """
    source = generator(seed)
    K, N = 65, 48
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(torch.randn(N, K, generator=source))
    x = torch.randn(20, K, generator=source) * 3 + 0.5
    y = _torch_dynamic(linear)(x)

    w_q, w_scale = quantize_weight(linear.weight, PAPER)
    ours = Int8Linear(w_q, w_scale, linear.bias, granularity=PAPER.granularity("c_fc"))
    result = ours(x)
    largest = result.abs() + linear.bias.abs()
    assert_within(result, y, 6 * EPS32 * largest, engine=engine)


def test_paper_reduces_the_range_where_torch_does(engine):
    assert PAPER.granularity("c_fc") == ("batch" if engine == "qnnpack" else "batch_7bit")


def test_torch_leaves_the_attention_of_open_clip_float():
    """The fact that PAPER's docstring states."""
    block = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "c_fc": nn.Linear(8, 8)})
    dynamic = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    assert dynamic.attn.in_proj_weight.dtype == torch.float32
    assert dynamic.attn.out_proj.weight.dtype == torch.float32
    assert type(dynamic.c_fc).__name__ == "Linear" and "dynamic" in type(dynamic.c_fc).__module__


def _torch_dynamic(linear):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]


def test_channel_copies_by_hand():
    """Median 1, so a limit of 1.5: 9 -> 6 parts, 100 -> 8 at most; 1.5 is not above it."""
    gamma = torch.ones(256)
    gamma[3], gamma[5], gamma[7] = -9.0, 1.5, 0.0
    copies = channel_copies(gamma, None)
    assert copies[[3, 5, 7]].tolist() == [6, 1, 1] and copies.sum() == 261
    beta = torch.zeros(256)
    beta[7] = 100.0
    both = channel_copies(gamma.half(), beta)
    assert both[[3, 7]].tolist() == [6, 8]
    assert channel_copies(torch.ones(256), None).eq(1).all()
    assert channel_copies(torch.zeros(256), beta * 0).eq(1).all()


def test_channel_copies_add_at_most_a_sixteenth():
    """64 of 256 channels at 4: two parts each would be 64 more, so that the limit doubles twice."""
    gamma = torch.ones(256)
    gamma[:64] = 4.0
    gamma[0] = 20.0
    copies = channel_copies(gamma, None)
    assert copies[0] == 4 and copies[1:].eq(1).all()
