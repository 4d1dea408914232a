"""The definitions against hand-worked cases and float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lraee.ops import Norm, PackedLinear, ProbeHead, reference
from tests.support import EPS32, assert_same, assert_within, generator, quantized_linear


def test_lane_sum_adds_in_the_stated_order() -> None:
    v = torch.randn(3, 150, generator=generator(0))
    lanes = [[0.0] * 64 for _ in range(3)]
    for row in range(3):
        for i in range(150):
            one = torch.tensor(lanes[row][i % 64]) + v[row, i]
            lanes[row][i % 64] = one.item()
        half = 32
        while half:
            for i in range(half):
                pair = torch.tensor(lanes[row][i]) + torch.tensor(lanes[row][i + half])
                lanes[row][i] = pair.item()
            half //= 2
    assert_same(reference.lane_sum(v), torch.tensor([lane[0] for lane in lanes]))


def test_lane_sum_of_nothing_is_zero() -> None:
    assert_same(reference.lane_sum(torch.empty(2, 0)), torch.zeros(2))


def test_quantize_rows_symmetric_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]])
    x_q, x_scale, x_zero = reference.quantize_rows(x, True)
    # Half to even: -63.5 -> -64, 0.5 -> 0, 1.5 -> 2.
    assert x_q.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]
    assert x_scale.tolist() == [1.0, 1.0]
    assert x_zero.tolist() == [0, 0]


def test_quantize_rows_asymmetric_by_hand() -> None:
    x = torch.tensor([[0.0, 255.0, 1.0], [-255.0, 0.0, -1.0], [-1.0, 254.0, 0.0], [0.0, 0.0, 0.0]])
    x_q, x_scale, x_zero = reference.quantize_rows(x, False)
    assert x_zero.tolist() == [-128, 127, -127, -128]
    assert x_q.tolist() == [[-128, 127, -127], [-128, 127, 126], [-128, 127, -127], [-128] * 3]
    assert x_scale.tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_rows_marks_only_the_bad_row(symmetric: bool, bad: float) -> None:
    x = torch.randn(3, 20, generator=generator(1))
    clean = reference.quantize_rows(x, symmetric)
    x[1, 7] = bad
    x_q, x_scale, x_zero = reference.quantize_rows(x, symmetric)
    assert math.isnan(x_scale[1]) and x_zero[1] == 0 and not x_q[1].any()
    for after, before in zip((x_q, x_scale, x_zero), clean, strict=True):
        assert_same(after[[0, 2]], before[[0, 2]])


def test_quantize_rows_whose_range_overflows_is_marked_not_wrong() -> None:
    x = torch.tensor([[3e38, -3e38]])
    assert reference.quantize_rows(x, False)[1].isnan().all()
    assert torch.isfinite(reference.quantize_rows(x, True)[1]).all()


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    symmetric=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_quantize_rows_round_trip_error_is_at_most_half_a_step(
    values: list[float], symmetric: bool
) -> None:
    x = torch.tensor([values])
    x_q, x_scale, x_zero = reference.quantize_rows(x, symmetric)
    back = (x_q.double() - x_zero.double()) * x_scale.double()
    # Half a step for rounding x. Asymmetric: the zero point is rounded too, which can push an end
    # of the range past -128 or 127 by at most half a step more. Divisions: 256 steps * 2 roundings.
    half_steps = 0.5 if symmetric else 1.0
    bound = x_scale.double() * (half_steps + 512 * EPS32) + reference.SMALLEST_SCALE * 255
    assert_within(back, x, bound[:, None].expand_as(back), values=values, symmetric=symmetric)


def test_layer_norm_quantize_is_layer_norm_then_quantize_rows() -> None:
    source = generator(2)
    x = torch.randn(9, 200, generator=source) * 3 + 5
    gamma, beta = torch.randn(200, generator=source), torch.randn(200, generator=source)
    x_q, x_scale, x_zero = reference.layer_norm_quantize(x, gamma, beta, 1e-5, False)
    back = (x_q.double() - x_zero.double()[:, None]) * x_scale.double()[:, None]
    truth = F.layer_norm(x.double(), (200,), gamma.double(), beta.double(), 1e-5)
    # One step as in the round trip above; the norm itself is exact to a few float32 roundings.
    bound = x_scale.double()[:, None] * 1.001 + truth.abs() * 64 * EPS32
    assert_within(back, truth, bound)


def test_int8_linear_by_hand() -> None:
    x_q = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
    w_q = torch.tensor([[5, 6], [-7, 8], [1, 0]], dtype=torch.int8)
    w, w_sum = reference.pack_weight(w_q)
    assert w_sum.tolist() == [11, 1, 1]
    y = reference.int8_linear(
        x_q, torch.tensor([0.5, 2.0]), torch.tensor([1, 0], dtype=torch.int32),
        PackedLinear(
            w, torch.tensor([1.0, 2.0, 4.0]), w_sum, torch.tensor([0.0, 1.0, 0.0]),
            layer_scale=torch.tensor([1.0, 10.0, 1.0]),
        ),
        residual=torch.tensor([[0.0, 0.0, 100.0], [0.0, 0.0, 0.0]]),
    )  # fmt: skip
    # Row 0: acc = 17, 9, 1; minus zero * w_sum = 6, 8, 0; times 0.5 * w_scale = 3, 8, 0.
    # Row 1: acc = -9, -53, 3; times 2 * w_scale = -18, -212, 24.
    assert y.tolist() == [[3.0, 90.0, 100.0], [-18.0, -2110.0, 24.0]]


@pytest.mark.parametrize("K", [1, 768, reference.MAX_K])
def test_int8_linear_integers_are_exact_at_the_extremes(K: int) -> None:
    x_q = torch.full((1, K), 127, dtype=torch.int8)
    w, w_sum = reference.pack_weight(torch.full((1, K), -128, dtype=torch.int8))
    zero = torch.tensor([-128], dtype=torch.int32)
    one = torch.ones(1)
    y = reference.int8_linear(x_q, one, zero, PackedLinear(w, one, w_sum))
    assert y.item() == float(torch.tensor(-255 * 128 * K, dtype=torch.int64))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activations_against_float64(activation: str) -> None:
    y = torch.linspace(-12, 12, 4001)
    z = y.double()
    truth = {
        "gelu": 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "quick_gelu": z * torch.sigmoid(1.702 * z),
    }[activation]
    # 1 + erf cancels for negative y: the absolute error is a few roundings of |y|.
    assert_within(reference.activate(y, activation), truth, y.abs().double() * 8 * EPS32)


def test_int8_linear_refuses_a_foreign_layout() -> None:
    case = quantized_linear(2, 5, 8)
    with pytest.raises(ValueError, match=r"int8_linear: w must have the plain layout \[N, K\]"):
        w, w_sum = torch.zeros(1, 2, 16, 4, dtype=torch.int8), torch.zeros(5, dtype=torch.int32)
        linear = PackedLinear(w, case["w_scale"], w_sum)
        reference.int8_linear(case["x_q"], case["x_scale"], None, linear)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [1, 2, 50, 77])
def test_int8_attention_is_attention(L: int, causal: bool) -> None:
    B, H, d = 2, 3, 16
    qkv = torch.randn(B, L, 3 * H * d, generator=generator(3))
    y = reference.int8_attention(qkv, H, causal)
    q, k, v = qkv.double().view(B, L, 3, H, d).permute(2, 0, 3, 1, 4)
    truth = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # A score is wrong by at most delta: half a step of q times |k'|_1 and the reverse. Then each
    # probability is wrong by a factor of at most exp(2 delta), and y by that share of max |v|.
    k = k - k.mean(2, keepdim=True)
    q_step, k_step = q.abs().amax(-1) / 254, k.abs().amax(-1) / 254
    delta = q_step * k.abs().sum(-1).amax(-1, True) + (k_step.amax(-1, True) * q.abs().sum(-1))
    share = torch.expm1(2 * (delta + d * q_step * k_step.amax(-1, True)) / math.sqrt(d))
    bound = (2 * share * v.abs().amax((-1, -2))[..., None])[..., None].expand_as(truth) + 1e-6
    assert_within(y.view(B, L, H, d).transpose(1, 2), truth, bound, L=L, causal=causal)


def test_int8_attention_does_not_see_a_shift_of_all_keys() -> None:
    qkv = torch.randn(1, 20, 3 * 32, generator=generator(4))
    shifted = qkv.clone()
    shifted[:, :, 32:64] += 64.0
    # 64 is exact to 2^-18 here, so centred keys agree to that; one step of int8 is far larger.
    y, y_shifted = reference.int8_attention(qkv, 2), reference.int8_attention(shifted, 2)
    assert_within(y_shifted, y, 2e-2)
    unshifted_error = (y_shifted - y).abs().max()
    assert unshifted_error < 0.1 * y.abs().max()


def _probe_arguments(two_layers: bool, has_class_token: bool = False) -> tuple[Tensor, ProbeHead]:
    source = generator(5)
    B, L, D, H, E, K = 3, 10, 24, 20, 12, 7
    P = 2 * D if has_class_token else D
    z = torch.randn(B, L, D, generator=source) + 3

    def linear(N: int, K_in: int) -> PackedLinear:
        w_q = torch.randint(-127, 128, (N, K_in), generator=source, dtype=torch.int8)
        w, w_sum = reference.pack_weight(w_q)
        scale, bias = torch.rand(N, generator=source) * 0.01, torch.rand(N, generator=source)
        return PackedLinear(w, scale, w_sum, bias)

    first = linear(H if two_layers else E, P)
    second = linear(E, H) if two_layers else None
    classes = F.normalize(torch.randn(K, E, generator=source), dim=1)
    norm = Norm(torch.rand(P, generator=source) + 0.5, torch.randn(P, generator=source), 1e-5)
    return z, ProbeHead(norm, first, second, classes, 20.0, torch.tensor([1.5, -0.5, 0.02, 0.1]))


@pytest.mark.parametrize("has_class_token", [False, True])
@pytest.mark.parametrize("two_layers", [True, False])
def test_exit_probe_against_its_formula(two_layers: bool, has_class_token: bool) -> None:
    z, head = _probe_arguments(two_layers, has_class_token)
    norm, first, second, classes, logit_scale, gate = head
    embedding, top1, confidence, margin, variance, score = reference.exit_probe(z, head)
    patches = z[:, 1:].double()
    mean = patches.mean(1)
    sav = (patches - mean[:, None]).square().sum(-1).mean(-1)
    assert_within(variance, sav, sav * 1e-5)
    pooled = torch.cat([mean, z[:, 0].double()], 1) if has_class_token else mean
    x = F.layer_norm(pooled, pooled.shape[1:], norm.gamma.double(), norm.beta.double(), norm.eps)

    def linear(x: Tensor, layer: PackedLinear) -> Tensor:
        assert layer.bias is not None
        return x @ (layer.w * layer.w_scale[:, None]).double().T + layer.bias.double()

    y = linear(x, first)
    y = y if second is None else linear(F.gelu(y), second)
    assert_within(embedding, y, 0.05 * float(y.abs().max()))
    p = (logit_scale * F.normalize(embedding.double(), dim=1) @ classes.double().T).softmax(1)
    top = p.topk(2, dim=1)
    assert top1.tolist() == top.indices[:, 0].tolist()
    assert_within(confidence, top.values[:, 0], 1e-5)
    assert_within(margin, top.values[:, 0] - top.values[:, 1], 1e-5)
    features = torch.stack([confidence, margin, variance, torch.ones(3)], 1)
    assert_within(score, torch.sigmoid((features * gate).double().sum(1)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exit_probe_sees_the_class_token_behind_the_patch_mean(dtype: torch.dtype) -> None:
    """By hand: patches (2, -1), (4, -1) have mean (3, -1) and variance 1; class token (1, -3).

    The row (3, -1, 1, -3) has mean 0 and variance 5, so with eps = 4 LayerNorm divides by 3; gamma
    makes it (127, -1, 10, -128): step 1, zero point 0. W1 gives (147, -129), its scales and b1
    (74, -250). The second class looks the other way of the second axis.
    """
    z = torch.tensor([[[1, -3], [2, -1], [4, -1]]], dtype=dtype)
    gamma, beta = torch.tensor([127.0, 3.0, 30.0, 128.0]), torch.zeros(4)
    w1, w1_sum = reference.pack_weight(torch.tensor([[1, 0, 2, 0], [0, 1, 0, 1]]).to(torch.int8))
    layer = PackedLinear(w1, torch.tensor([0.5, 2.0]), w1_sum, torch.tensor([0.5, 8.0]))
    classes, gate = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    embedding, top1, confidence, _, variance, score = reference.exit_probe(
        z, ProbeHead(Norm(gamma, beta, 4.0), layer, None, classes, 2.0, gate)
    )
    assert_same(embedding, torch.tensor([[74.0, -250.0]]))
    assert_same(variance, torch.tensor([1.0]))
    assert top1.tolist() == [1]
    ratio = math.exp(2 * (74 - 250) / math.hypot(74, 250))
    assert_within(confidence, torch.tensor([1 / (1 + ratio)], dtype=torch.float64), 1e-6)
    assert_within(score, torch.tensor([1 / (1 + math.exp(-1))], dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("has_class_token", [False, True])
def test_exit_probe_keeps_a_bad_image_to_itself(has_class_token: bool) -> None:
    z, head = _probe_arguments(True, has_class_token)
    clean = reference.exit_probe(z, head)
    z = z.clone()
    z[1, 4, 3] = math.nan
    spoilt = reference.exit_probe(z, head)
    for after, before in zip(spoilt, clean, strict=True):
        assert_same(after[[0, 2]], before[[0, 2]])
    assert spoilt[1][1] == 0 and all(spoilt[i][1].isnan().all() for i in (0, 2, 3, 4, 5))


def test_exit_probe_with_one_class() -> None:
    z, head = _probe_arguments(True)
    head = head._replace(classes=head.classes[:1])
    _, top1, confidence, margin, _, _ = reference.exit_probe(z, head)
    assert top1.tolist() == [0, 0, 0]
    assert_same(confidence, torch.ones(3))
    assert_same(margin, confidence)


def test_rope_by_hand() -> None:
    """Two tokens, one head of d = 2; the second token is turned by 90 degrees: (3, 4) -> (-4, 3).

    With q = k = v the turned token and its key are (-4, 3); the first stays (1, 0).
    """
    token = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    turned = torch.tensor([[1.0, 0.0], [-4.0, 3.0]])
    rope = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    qkv = torch.cat([token, token, token], 1)[None]
    expected = torch.cat([turned, turned, token], 1)[None]
    y = reference.int8_attention(qkv, 1, False, rope)
    assert_same(y, reference.int8_attention(expected, 1))
    assert not torch.equal(y, reference.int8_attention(qkv, 1))


def test_key_mask_by_hand() -> None:
    """One valid token: every query gets its value, whatever the others hold; none: 0."""
    qkv = torch.randn(2, 3, 3 * 4, generator=generator(6))
    qkv[0, 0] = math.nan
    mask = torch.tensor([[False, True, False], [False, False, False]])
    y = reference.int8_attention(qkv, 2, False, None, mask)
    for token in (1, 2):
        assert_same(y[0, token], qkv[0, 1, 8:])
    assert not y[1].any()


def test_rms_norm_by_hand() -> None:
    """(3, 4, 0, 0) has mean square 6.25, so with eps = 0 it is divided by 2.5."""
    x_q, x_scale, x_zero = reference.layer_norm_quantize(
        torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([2.0, 1.0, 1.0, 1.0]), None, 0.0, False
    )
    assert_same(x_scale, torch.tensor([2.4]) / 255)
    assert x_zero.tolist() == [-128] and x_q.tolist() == [[127, 42, -128, -128]]


def test_gated_quantize_by_hand() -> None:
    """gate * up = (255, 0.25): scale 1, and of the rest 0.25 the step 1 / 254 takes 63.5 -> 64."""
    x = torch.tensor([[51.0, 0.5, 5.0, 0.5]])
    x_q, x_scale, x_zero, r_q, r_scale = reference.gated_quantize(x, "none")
    assert x_q.tolist() == [[127, -128]] and x_zero.tolist() == [-128] and x_scale.tolist() == [1]
    assert r_q.tolist() == [[0, 64]]
    assert_same(r_scale, torch.tensor([1.0]) / 254)
    silu = reference.gated_quantize(torch.tensor([[2.0, 3.0]]), "silu")
    back = (silu[0].float() - silu[2]) * silu[1] + silu[3] * silu[4]
    assert_within(back, torch.tensor([[6 / (1 + math.exp(-2))]], dtype=torch.float64), 1e-4)
