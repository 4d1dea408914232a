"""Int8Linear: numbers, state, moving and saving."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import INT8, quantize_weight
from lraee.ops import PackedLinear, reference
from tests.support import assert_same, generator


def make_linear(N=24, K=33, *, bias=True, seed=0, **options):
    source = generator(seed)
    w_q, w_scale = quantize_weight(torch.randn(N, K, generator=source), INT8)
    return Int8Linear(
        w_q, w_scale, torch.randn(N, generator=source) if bias else None, **options
    ), w_q  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["row", "row_symmetric"])
def test_forward_is_the_operators(backend, bias, granularity):
    linear, w_q = make_linear(bias=bias, granularity=granularity, backend=backend)
    x = torch.randn(2, 5, 33, generator=generator(1))
    x_q, x_scale, x_zero = reference.quantize_rows(x.view(10, 33), granularity == "row_symmetric")
    plain = PackedLinear(w_q, linear.w_scale, w_q.sum(1, dtype=torch.int32), linear.bias)
    expected = reference.int8_linear(x_q, x_scale, x_zero, plain)
    assert_same(linear(x), expected.view(2, 5, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_changes_the_type_computed_for_and_nothing_else(dtype):
    linear, w_q = make_linear()
    scale, bias = linear.w_scale.clone(), linear.bias.clone()
    linear.to(dtype)
    assert linear.dtype == linear.weight.dtype == dtype
    assert_same(linear.w_scale, scale)
    assert_same(linear.bias, bias)
    assert_same(linear.w_q, w_q)
    x = torch.randn(3, 33).to(dtype)
    assert_same(linear(x), linear.float()(x.float()).to(dtype))
    assert linear.weight.dtype == torch.float32


def test_weight_is_the_dequantized_one():
    linear, w_q = make_linear()
    assert_same(linear.weight, w_q * linear.w_scale[:, None])
    assert (linear.out_features, linear.in_features) == (24, 33)


@pytest.mark.parametrize(
    "change", [nn.Module.share_memory, lambda m: m.to(memory_format=torch.channels_last)]
)
def test_other_moves_keep_the_numbers(change):
    linear, w_q = make_linear()
    x = torch.randn(3, 33)
    before = linear(x)
    assert_same(change(linear)(x), before)
    assert_same(linear.w_q, w_q)


def test_share_memory_shares_the_weight():
    linear, _ = make_linear()
    linear.share_memory()
    assert all(b.is_shared() for b in linear.buffers())


def test_state_dict_holds_the_plain_weight():
    linear, w_q = make_linear()
    state = linear.state_dict()
    assert set(state) == {"w_q", "w_scale", "bias"}
    assert_same(state["w_q"], w_q)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    source, _ = make_linear(seed=1)
    target, _ = make_linear(seed=2)
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    x = torch.randn(3, 33)
    assert_same(target(x), source(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w_q"), 'Missing key.*"w_q"'),
        (lambda s: s.update(extra=s["bias"]), 'Unexpected key.*"extra"'),
        (
            lambda s: s.update(w_q=s["w_q"].int()),
            r"w_q must be torch.int8 \[24, 33\], got torch.in",
        ),
        (lambda s: s.update(w_q=s["w_q"][1:]), r"w_q must be torch.int8 \[24, 33\], got .*23, 33"),
    ],
)
def test_state_dict_errors(change, message):
    linear, w_q = make_linear()
    state = linear.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        linear.load_state_dict(state)
    assert_same(linear.w_q, w_q)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_and_pickle(again):
    linear, w_q = make_linear()
    twin = again(linear)
    x = torch.randn(3, 33)
    assert_same(twin(x), linear(x))
    assert set(twin.state_dict()) == set(linear.state_dict())
    assert {n for n, _ in twin.named_buffers()} == {n for n, _ in linear.named_buffers()}
    twin.bias.zero_()
    assert linear.bias.abs().max() > 0


def test_a_pickle_of_one_layout_loads_where_another_is_read():
    linear, w_q = make_linear()
    linear_state = linear.__getstate__()
    assert "w" not in linear_state["_buffers"]
    assert_same(linear_state["_buffers"]["w_q"], w_q)


def test_to_meta_keeps_shapes():
    linear, _ = make_linear()
    moved = copy.deepcopy(linear).to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    assert moved.w_scale.dtype == torch.float32


def test_the_bias_is_a_copy():
    bias = torch.ones(2)
    linear = Int8Linear(torch.ones(2, 3, dtype=torch.int8), torch.ones(2), bias)
    linear.bias.zero_()
    assert bias.sum() == 2


def test_a_scaled_input_meets_the_weight_of_the_scaled_one():
    """in_scale evens out a loud channel before it is quantized; `weight` is that of the input."""
    source = generator(4)
    weight, x = torch.randn(24, 33, generator=source), torch.randn(50, 33, generator=source)
    x[:, 4] *= 64
    in_scale = torch.ones(33)
    in_scale[4] = 1 / 8
    plain = Int8Linear(*quantize_weight(weight, INT8), None)
    scaled = Int8Linear(*quantize_weight(weight / in_scale, INT8), None)
    scaled.in_scale = in_scale
    expected = x @ weight.T
    assert (scaled(x) - expected).norm() < 0.6 * (plain(x) - expected).norm()
    assert_same(scaled.quantize(x)[0], plain.quantize(x * in_scale)[0])
    assert_same(scaled.weight, scaled.w_q * scaled.w_scale[:, None] * in_scale)
    assert (scaled.weight - weight).abs().max() < scaled.w_scale.max()


def test_copies_leave_the_product_and_even_out_a_loud_channel():
    """A loud channel in 8 parts leaves finer steps to the others; `weight` is still the weight."""
    source = generator(3)
    weight, x = torch.randn(24, 33, generator=source), torch.randn(50, 33, generator=source)
    x[:, 4] *= 16
    copies = torch.ones(33)
    copies[4], copies[32] = 8, 2
    w_q, w_scale = quantize_weight(weight, INT8)
    plain = Int8Linear(w_q, w_scale, None)
    cut = Int8Linear(w_q, w_scale, None, copies=copies)
    expected = x @ plain.weight.T
    assert (cut(x) - expected).norm() < 0.5 * (plain(x) - expected).norm()
    assert_same(cut.w_q, w_q)
    assert_same(cut.weight, plain.weight)
    parts, scale, zero = cut.quantize(x)
    assert parts.shape == (50, 41)
    held = cut.joined((parts - zero[:, None]) * scale[:, None])
    torch.testing.assert_close(cut(x), held @ cut.weight.T, rtol=1e-5, atol=1e-4)
    assert ((held - x).abs() <= 0.501 * scale[:, None] * copies).all()


@pytest.mark.parametrize("R", [24, 8])
def test_a_second_term_of_the_weight_is_16_bits(R):
    """In the last R rows the output is the float weight's, but for the input's error."""
    source = generator(5)
    weight, x = torch.randn(24, 33, generator=source), torch.randn(50, 33, generator=source)
    w_q, w_scale = quantize_weight(weight, INT8)
    left = (weight - w_q * w_scale[:, None])[-R:]
    bias, add = torch.randn(24, generator=source), torch.randn(50, 24, generator=source)
    one = Int8Linear(w_q, w_scale, bias)
    two = Int8Linear(w_q, w_scale, bias, rest=quantize_weight(left, INT8))
    x_q, x_scale, x_zero = two.quantize(x)
    held = (x_q - x_zero[:, None]) * x_scale[:, None]
    y, first = two(x), one(x)
    assert_same(y[:, :-R], first[:, :-R])
    exact = held @ weight.T + bias
    torch.testing.assert_close(y[:, -R:], exact[:, -R:], rtol=0, atol=2e-3)
    assert (two.weight - weight)[-R:].abs().max() < 1e-3 * w_scale.max() * 127
    if R == 24:
        scale = torch.rand(24, generator=source)
        given = {"residual": add, "layer_scale": scale, "out_dtype": torch.float32}
        z = two.multiply((x_q, x_scale, x_zero), **given)
        torch.testing.assert_close(z, exact * scale + add, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["scale", "copies", "rest", "both"])
def test_scales_copies_and_second_terms_travel(kind):
    source = generator(6)
    weight, x = torch.randn(24, 33, generator=source), torch.randn(9, 33, generator=source)
    w_q, w_scale = quantize_weight(weight, INT8)
    copies = torch.ones(33)
    copies[[0, 20]] = torch.tensor([3.0, 2.0])
    left = (weight - w_q * w_scale[:, None])[16:]
    options = {"copies": copies} if kind in ("copies", "both") else {}
    options |= {"rest": quantize_weight(left, INT8)} if kind in ("rest", "both") else {}
    linear = Int8Linear(w_q, w_scale, None, **options)
    if kind == "scale":
        linear.in_scale = torch.rand(33, generator=source) + 0.5
    bits = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert_same(other(x), bits)
    given = dict(options)
    if "copies" in given:
        given["copies"] = copies.roll(1)
    blank = Int8Linear(torch.zeros_like(w_q), torch.ones(24), None, **given)
    blank.in_scale = None if linear.in_scale is None else torch.ones(33)
    blank.load_state_dict(linear.state_dict())
    assert_same(blank.half().float()(x), bits)
    assert_same(torch.cat([linear(row[None]) for row in x]), bits)
    spoiled = x.clone()
    spoiled[4, 7] = float("nan")
    y = linear(spoiled)
    others = torch.arange(9) != 4
    assert y[4].isnan().all()
    assert_same(y[others], bits[others])


def test_two_terms_are_254_times_as_fine():
    """The error of x is bound by x_scale / 508 for each of K products with |w| <= 1."""
    source = generator(4)
    w_q = torch.randint(-127, 128, (24, 33), generator=source, dtype=torch.int8)
    w_scale, x = torch.full((24,), 1 / 127), torch.randn(50, 33, generator=source)
    one, two = (Int8Linear(w_q, w_scale, None, has_two_terms=has) for has in (False, True))
    expected = x.double() @ one.weight.double().T
    _, x_scale, _ = reference.quantize_rows(x, False)
    # and sums of two float32 of up to K max|x|, rounded once each
    bound = 33 * (x_scale[:, None].double() / 508 + 3 * 2.0**-24 * x.abs().amax(1, keepdim=True))
    assert ((two(x).double() - expected).abs() <= bound).all()
    assert ((one(x).double() - expected).abs() > bound).any()
