"""Operators and a whole small model on CUDA, held to the definition and to the CPU.

Every test also runs in Triton's interpreter, so that what a GPU has to show is the GPU alone.
The definition always runs on the CPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import lraee
from lraee.diagnostics import selftest_inputs
from lraee.kernels import register
from lraee.ops import error_bounds as bounds
from lraee.ops import reference, registry
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.kernels.places import Place, at
from tests.support import assert_same, assert_within

PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
FIVE_TOKENS = {"patch_size": 16}
"""The interpreter runs about 1e9 operations a second."""
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and Inf


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with at(request.param) as result:
        yield result


def moved(values: Any, place: Place) -> Any:
    """Tensors of a list, dict or record on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(place.device), values)


def assert_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor], **why: object) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert_same(value.cpu(), wanted.cpu(), **why)


# Operators


@pytest.mark.gpu
def test_every_operator_with_a_kernel_is_registered_for_cuda() -> None:
    assert registry.TRITON_ERROR is None and not register.is_interpreted()
    for name in register.LAUNCHERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lraee::{name}", "CUDA")


@pytest.mark.parametrize("symmetric", [False, True])
def test_row_operators(place: Place, symmetric: bool) -> None:
    for seed, (M, K) in enumerate([(1, 33), (17, 64), (5, 770)]):
        x = selftest_inputs.rows_with_extremes(M, K, seed).to(selftest_inputs.TYPES[seed % 3])
        actual = place.operators.quantize_rows(x.to(place.device), symmetric)
        assert_all_same(actual, reference.quantize_rows(x, symmetric), seed=seed)
        gamma, beta = torch.randn(2, K).unbind()
        there = moved([x, gamma, beta], place)
        actual = place.operators.layer_norm_quantize(*there, 1e-5, symmetric)
        expected = reference.layer_norm_quantize(x, gamma, beta, 1e-5, symmetric)
        assert_all_same(actual, expected, seed=seed)


def test_weights(place: Place) -> None:
    w_q = torch.randint(-128, 128, (33, 77), dtype=torch.int8)
    w, w_sum = place.operators.pack_weight(w_q.to(place.device))
    assert_all_same((w, w_sum), (w_q, w_q.sum(1, dtype=torch.int32)))
    assert_same(place.operators.unpack_weight(w, 33, 77).cpu(), w_q)


def call_linear(place: Place, given: dict[str, Any], activation: str) -> Tensor:
    """int8_linear on the device."""
    named = moved(given, place)
    operands = [named.pop(name) for name in ("x_q", "x_scale", "x_zero", "linear")]
    y: Tensor = place.operators.int8_linear(*operands, **named, activation=activation)
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_linear(place: Place, activation: str) -> None:
    for seed, (M, N, K) in enumerate([(1, 33, 77), (50, 40, 200), (17, 20, 1040), (70, 8, 64)] * 2):
        given = selftest_inputs.linear(M, N, K, seed + 8)
        actual = call_linear(place, given, activation).cpu()
        expected = reference.int8_linear(**given, activation=activation)
        assert actual.dtype == expected.dtype
        assert_within(actual, expected, bounds.of_linear(given, activation), seed=seed)


@pytest.mark.parametrize("causal", [False, True])
def test_int8_attention(place: Place, causal: bool) -> None:
    for seed, (B, L, H, d) in enumerate([(2, 50, 2, 8), (1, 17, 3, 33), (1, 257, 1, 16)]):
        qkv = selftest_inputs.attention(B, L, H, d, seed)
        actual = place.operators.int8_attention(qkv.to(place.device), H, causal).cpu()
        expected = reference.int8_attention(qkv, H, causal)
        assert actual.dtype == expected.dtype
        assert_within(actual, expected, bounds.of_attention(qkv, expected, H), seed=seed)


@pytest.mark.parametrize("has_class_token", [False, True])
def test_exit_probe(place: Place, has_class_token: bool) -> None:
    for seed, shape in enumerate([(1, 10, 64, 48, 32, 70), (3, 5, 33, None, 20, 7)]):
        z, head = selftest_inputs.probe(*shape, seed, has_class_token)
        results = place.operators.exit_probe(*moved((z, head), place))
        embedding, top1, confidence, margin, variance, score = (value.cpu() for value in results)
        wanted = reference.exit_probe(z, head)
        assert_same(variance, wanted[4], seed=seed)
        assert_within(embedding, wanted[0], bounds.of_embedding(z, head), seed=seed)
        decided = bounds.decision(embedding, variance, head)
        result = {"top1": top1, "confidence": confidence, "margin": margin, "score": score}
        for name, bound in bounds.of_decision(shape[-1]).items():
            assert_within(result[name], decided[name], bound, name=name, seed=seed)


def test_operators_give_a_row_the_same_bits_in_any_batch(place: Place) -> None:
    """Batches of several buckets of the config table, split-K among them."""
    ops, M = place.operators, 270
    x, gamma = torch.randn(M, 96).to(place.device), torch.rand(96).to(place.device)
    given = selftest_inputs.linear(M, 33, 1040, 15)
    per_row = ("x_q", "x_scale", "x_zero", "residual")
    qkv = torch.randn(5, 17, 3 * 16).to(place.device)
    probe = moved(selftest_inputs.probe(18, 5, 64, 48, 32, 80, 0, True), place)
    whole = call_linear(place, given, "gelu")
    norms = ops.layer_norm_quantize(x, gamma, gamma, 1e-5, False)
    for first, last in ((0, 1), (7, 23), (60, 200)):
        part = {**given, **{name: given[name][first:last] for name in per_row}}
        y = call_linear(place, part, "gelu")
        assert_same(y.cpu(), whole[first:last].cpu(), rows=(first, last))
        part_norms = ops.layer_norm_quantize(x[first:last], gamma, gamma, 1e-5, False)
        assert_all_same(part_norms, [value[first:last] for value in norms])
    attended, probed = ops.int8_attention(qkv, 2), ops.exit_probe(*probe)
    assert_same(ops.int8_attention(qkv[3:4], 2).cpu(), attended[3:4].cpu())
    for first, last in ((0, 1), (5, 18)):
        part_probe = ops.exit_probe(probe[0][first:last], probe[1])
        assert_all_same(part_probe, [value[first:last] for value in probed])


# A whole model


def same_bits_alone(model: Any, images: Tensor) -> Tensor:
    """Embeddings of the batch; fails unless each image has the same bits alone and elsewhere."""
    whole = model.encode_image(images)
    for i in range(len(images)):
        assert_same(model.encode_image(images[i : i + 1]).cpu(), whole[i : i + 1].cpu(), image=i)
    turned = model.encode_image(images.flip(0))
    assert_same(turned.flip(0).cpu(), whole.cpu())
    return whole


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """A value next to a tie may fall to the other side after an activation: one step of 255.

    On a GPU the float layers around the blocks are torch's own, the patch embedding in TF32.
    """
    cosine = torch.nn.functional.cosine_similarity(actual.cpu(), expected.cpu())
    assert (cosine > 1 - 1e-3).all(), cosine


@pytest.mark.parametrize(
    "options",
    [{"quick_gelu": True}, {"vision": {"ls_init_value": 0.3}}],
    ids=["quick_gelu", "layer_scale"],
)
@torch.inference_mode()
def test_model(place: Place, options: dict[str, Any]) -> None:
    vision = {"layers": 1, **options.pop("vision", {})}
    model = make_model(vision=vision, **options)
    images = make_images(2)
    expected = lraee.accelerate(model).encode_image(images)
    assert_close(place.accelerate(model).encode_image(images.to(place.device)), expected)


@torch.inference_mode()
def test_blocks_give_an_image_the_same_bits_in_any_batch(place: Place) -> None:
    """From the tokens on, where lraee's kernels alone compute."""
    model = place.accelerate(make_model(vision={**FIVE_TOKENS, "layers": 1}))
    tokens = torch.randn(2, 5, 64).to(place.device)
    blocks = model.visual.transformer
    whole = blocks(tokens)
    for i in range(2):
        assert_same(blocks(tokens[i : i + 1]).cpu(), whole[i : i + 1].cpu(), image=i)


@pytest.mark.usefixtures("fixed_order_of_sums")
@torch.inference_mode()
def test_model_gives_an_image_the_same_bits_in_any_batch(place: Place) -> None:
    model = place.accelerate(make_model(vision={**FIVE_TOKENS, "layers": 1}))
    same_bits_alone(model, make_images(2).to(place.device))


def surest_and_least_sure(fast: Any) -> Tensor:
    """Of 16 images, the one that leaves at the first exit most surely, and the last to do so."""
    images = make_images(16)
    with lraee.trace(fast) as t:
        fast.encode_image(images)
    order = t.scores[:, 0].argsort(descending=True)
    return images[order[[0, -1]]]


@pytest.mark.usefixtures("fixed_order_of_sums")
@torch.inference_mode()
def test_exits(place: Place) -> None:
    """The same exit and the same bits alone and in a batch, and nothing but int8 at full depth."""
    model = make_model(vision={**FIVE_TOKENS, "layers": 2})
    exits = make_exits(model, blocks=(1,))
    fast = place.accelerate(model, exits)
    images = surest_and_least_sure(lraee.accelerate(model, exits=exits)).to(place.device)
    with lraee.trace(fast) as t:
        whole = fast.encode_image(images)
    depths, scores = t.exit_block, t.scores
    assert depths.tolist() == [1, 2]
    for i in range(2):
        with lraee.trace(fast) as t:
            alone = fast.encode_image(images[i : i + 1])
        assert t.exit_block.item() == depths[i]
        assert_same(t.scores, scores[i : i + 1], image=i)
        assert_same(alone.cpu(), whole[i : i + 1].cpu(), image=i)
    with lraee.full_depth(fast):
        deep = fast.encode_image(images)
    assert_same(deep.cpu(), place.accelerate(model).encode_image(images).cpu())
    assert_same(whole[1].cpu(), deep[1].cpu())


@torch.inference_mode()
def test_there_and_back(place: Place) -> None:
    """A model that was on the device gives the bits that it gave before, from the same weights."""
    model = make_model(vision={**FIVE_TOKENS, "layers": 2})
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1,)))
    images = make_images(3)
    before, state = fast.encode_image(images), numbers(fast)
    fast.to(place.device)
    there = fast.encode_image(images.to(place.device))
    assert there.device.type == place.device.type
    for name, value in numbers(fast).items():
        assert_same(value, state[name], name=name)
    fast.to("cpu")
    assert_same(fast.encode_image(images), before)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, copied to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
