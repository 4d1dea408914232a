"""Exit heads: in float against torch's modules, in int8 against the definition of exit_probe."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.exits.head import EPS, HeadWeights, Int8Head, contrasts, pool
from lraee.layers.scheme import INT8, quantize_weight
from lraee.ops import Norm, PackedLinear, ProbeHead, reference
from tests.exits.random_exits import make_head
from tests.support import EPS32, assert_same, assert_within, generator

D, E, K = 40, 24, 9
GATE = torch.tensor([2.0, -1.0, 0.01, -0.5])
forms = pytest.mark.parametrize("hidden", [None, 33])
inputs = pytest.mark.parametrize("has_class_token", [False, True])


def tokens(B: int, L: int = 10, seed: int = 0) -> Tensor:
    source = generator(seed)
    return torch.randn(B, L, D, generator=source) * 2 + torch.randn(B, 1, D, generator=source) * 3


def unit_classes(seed: int = 3) -> Tensor:
    return F.normalize(torch.randn(K, E, generator=generator(seed)), dim=1)


def as_modules(head: HeadWeights) -> nn.Sequential:
    """The same head out of torch's own layers, in float64."""
    P, N = len(head.gamma), len(head.b1)
    norm, first = nn.LayerNorm(P, eps=EPS), nn.Linear(P, N)
    layers: list[nn.Module] = [norm, first]
    state = {"0.weight": head.gamma, "0.bias": head.beta, "1.weight": head.w1, "1.bias": head.b1}
    if head.w2 is not None and head.b2 is not None:
        layers += [nn.GELU(), nn.Linear(N, len(head.b2))]
        state |= {"3.weight": head.w2, "3.bias": head.b2}
    model = nn.Sequential(*layers).double()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model


@forms
@inputs
@torch.no_grad()
def test_float_head_is_torchs_layers(hidden: int | None, has_class_token: bool) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=has_class_token, seed=1)
    pooled = pool(tokens(17), has_class_token=has_class_token)
    expected = as_modules(head)(pooled.double())
    # Sums of at most 80 float32 products of values below 4, rounded at most once each
    assert_within(head(pooled), expected, 200 * 4 * EPS32)


@forms
@torch.no_grad()
def test_scaled_is_as_long_as_said(hidden: int | None) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=False, seed=2)
    pooled = pool(tokens(9), has_class_token=False)
    for factor in (0.25, 8.0):  # powers of two: exact
        assert_same(head.scaled(factor)(pooled), factor * head(pooled))
    assert head.scaled(2.0).gamma is head.gamma
    assert head.macs == head.scaled(3.0).macs


@forms
def test_folded_is_the_same_head_with_the_same_gradients(hidden: int | None) -> None:
    built = make_head(D, E, hidden=hidden, has_class_token=False, seed=2)
    weights = {name: tensor.double().requires_grad_() for name, tensor in built.tensors().items()}
    head = HeadWeights.of(weights)
    pooled = torch.randn(7, D, generator=generator(2), dtype=torch.float64)

    def gradients(form: HeadWeights) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(pooled).square().sum(), list(weights.values()))

    # Sums of at most 80 float64 products of values below 1e3: 80 * 1e3 * 1.2e-16 a gradient
    assert_within(head.folded()(pooled), head(pooled), 1e-11)
    for own, folded in zip(gradients(head), gradients(head.folded()), strict=True):
        assert_within(folded, own, 1e-11)


@forms
def test_tensors_and_back(hidden: int | None) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=True, seed=3)
    tensors = head.tensors()
    names = ["gamma", "beta", "w1", "b1"] + (["w2", "b2"] if hidden else [])
    assert list(tensors) == names and all(tensors[name] is getattr(head, name) for name in names)
    assert HeadWeights.of(tensors).tensors() == tensors
    assert head.macs == sum(t.numel() for name, t in tensors.items() if name in ("w1", "w2"))


def test_pool_by_hand() -> None:
    z = torch.tensor([[[9.0, 7.0], [1.0, 2.0], [3.0, 8.0]]]).half()
    assert_same(pool(z, has_class_token=False), torch.tensor([[2.0, 5.0]]))
    assert_same(pool(z, has_class_token=True), torch.tensor([[2.0, 5.0, 9.0, 7.0]]))


def definition(head: HeadWeights, z: Tensor, classes: Tensor, scale: float) -> tuple[Tensor, ...]:
    """reference.exit_probe on weights quantized here, plain layout."""

    def linear(w: Tensor, b: Tensor | None) -> PackedLinear:
        w_q, w_scale = quantize_weight(w, INT8, "reference")
        return PackedLinear(w_q, w_scale, w_q.sum(1, dtype=torch.int32), b)

    second = None if head.w2 is None else linear(head.w2, head.b2)
    norm = Norm(head.gamma, head.beta, EPS)
    operands = ProbeHead(norm, linear(head.w1, head.b1), second, classes, scale, GATE)
    return reference.exit_probe(z, operands)


@forms
@inputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_head_is_the_definition(
    hidden: int | None, has_class_token: bool, dtype: torch.dtype
) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=has_class_token, seed=4)
    z, classes = tokens(17).to(dtype), unit_classes()
    z[3] = torch.nan
    expected = definition(head, z, classes, 20.0)
    result = Int8Head(head, GATE, backend="reference")(z, classes, 20.0)
    for name, actual, wanted in zip(
        ("embedding", "top1", "confidence", "margin", "variance", "score"),
        result, expected, strict=True,
    ):  # fmt: skip
        assert_same(actual, wanted, name=name)
    # This machine's own: bit for bit up to exp (and, after a hidden layer, erf)
    result = Int8Head(head, GATE)(z, classes, 20.0)
    assert_same(result[4], expected[4], name="variance")
    if hidden is None:
        assert_same(result[0], expected[0], name="embedding")
        assert_same(result[1], expected[1], name="top1")
        for name, place in (("confidence", 2), ("margin", 3), ("score", 5)):
            assert_within(result[place], expected[place], 64 * EPS32, name=name)
    else:  # a step of the hidden row may fall to the other side of a tie: one step of int8
        cosine = F.cosine_similarity(result[0], expected[0])
        assert cosine[torch.arange(17) != 3].min() > 0.9999


@forms
def test_int8_head_is_close_to_the_float_one(hidden: int | None) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=True, seed=5)
    z, classes = tokens(33), unit_classes()
    module = Int8Head(head, GATE)
    embedding, top1, confidence, margin, variance, score = module(z, classes, 20.0)
    expected = head(pool(z, has_class_token=True))
    # Two steps in 255 of the range in and 127 of the weight, over 80 values that add at random
    assert F.cosine_similarity(embedding, expected).min() > 0.999
    p = torch.softmax(20.0 * F.normalize(embedding.double(), dim=1) @ classes.double().T, dim=1)
    best = p.topk(2, dim=1)
    assert_same(top1, best.indices[:, 0])
    assert_within(confidence, best.values[:, 0], 1e-5)
    assert_within(margin, best.values[:, 0] - best.values[:, 1], 1e-5)
    assert_within(variance, z[:, 1:].double().var(1, correction=0).sum(1), 1e-3)
    logit = 2.0 * confidence - margin + 0.01 * variance - 0.5
    assert_within(score, torch.sigmoid(logit.double()), 1e-6)
    assert module.embedding_size == E and module.macs == head.macs


def test_buffers_stay_float32_and_follow_the_device() -> None:
    head = make_head(D, E, hidden=33, has_class_token=True, seed=6)
    module = Int8Head(head, GATE)
    z, classes = tokens(5), unit_classes()
    expected = module(z.half(), classes, 20.0)
    for other in (module.half(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for name, buffer in other.named_buffers():
            is_integer = name.split(".")[-1] in ("w", "w_sum")
            is_marker = name.endswith("like")
            assert is_integer or is_marker or buffer.dtype == torch.float32, name
        for actual, wanted in zip(other(z.half(), classes, 20.0), expected, strict=True):
            assert_same(actual, wanted)
    meta = Int8Head(head, GATE).to("meta")
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}


def test_a_head_keeps_no_tie_to_what_it_was_made_of() -> None:
    head = make_head(D, E, hidden=None, has_class_token=False, seed=7)
    module = Int8Head(head, GATE)
    z, classes = tokens(3), unit_classes()
    expected = module(z, classes, 20.0)
    for tensor in head.tensors().values():
        tensor.zero_()
    for actual, wanted in zip(module(z, classes, 20.0), expected, strict=True):
        assert_same(actual, wanted)


def test_contrasts_tell_classes_apart_as_the_classes_do() -> None:
    """Logits but for one number of all classes, within half a float16 step of what is left.

    The classes share a channel of 0.6, as the texts of a CLIP do: in float16 as they are, they
    would be off by up to 100 * 0.6 * 2^-12 of a logit there alone.
    """
    classes, x = unit_classes(), F.normalize(torch.randn(50, E, generator=generator(4)), dim=1)
    classes[:, 5], x[:, 5] = 1.5, 1.5
    classes, x = F.normalize(classes, dim=1), F.normalize(x, dim=1)
    left = (classes - classes.mean(0)).double()
    told = contrasts(classes)
    assert told.dtype == torch.float16
    assert_same(contrasts(classes[:1]), torch.zeros(1, E, dtype=torch.float16))
    logits, result = 100 * x.double() @ classes.double().T, 100 * x.double() @ told.double().T
    bound = 100 * 2.0**-11 * left.norm(dim=1).max() + 100 * 4 * EPS32
    lost = result - logits
    assert_within(lost - lost.mean(1, keepdim=True), torch.zeros_like(lost), bound)
    assert torch.equal(result.argmax(1), logits.argmax(1))


@torch.no_grad()
def test_contrasts_and_classes_are_the_same_to_a_probe() -> None:
    """Confidence and margin within what the logits lose; embedding and variance bit for bit."""
    head = Int8Head(make_head(D, E, hidden=None, has_class_token=True, seed=5), GATE)
    classes, z = unit_classes(), tokens(40)
    plain, told = head(z, classes, 100.0), head(z, contrasts(classes), 100.0)
    assert_same(told[0], plain[0])
    assert_same(told[1], plain[1])
    assert_same(told[4], plain[4])
    shift = 2 * 100 * 2.0**-11 * float((classes - classes.mean(0)).norm(dim=1).max())
    for i in (2, 3):
        assert_within(told[i], plain[i], shift)
