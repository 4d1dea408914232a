"""The public face: answers, options and refusals of an accelerated model."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lraee
from lraee.layers import build
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.towers import flops
from tests.clip_models import (
    VARIANTS,
    blocks_of,
    make_images,
    make_lraee_tiny,
    make_model,
    make_texts,
)
from tests.support import TEXT_BOUND, assert_same, assert_within


@pytest.fixture
def model():
    return make_model()


# Same answers


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_embeddings_agree_with_float(variant):
    model = make_model(**VARIANTS[variant])
    images = make_images()
    fast = lraee.accelerate(model)
    expected, result = model.encode_image(images), fast.encode_image(images)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert F.cosine_similarity(result.flatten(1), expected.flatten(1)).min() > 0.999
    normal = fast.encode_image(images, normalize=True)
    assert_same(normal, F.normalize(result, dim=-1))
    assert all(isinstance(block, Int8Block) and block.can_fuse for block in blocks_of(fast))


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("variant", ["plain", "custom_text", "logit_bias"])
@torch.no_grad()
def test_forward_and_text_are_as_before(variant, output_dict):
    model = make_model(**VARIANTS[variant], output_dict=output_dict)
    fast = lraee.accelerate(model)
    images, texts = make_images(2), make_texts()
    assert type(fast) is type(model)
    assert_within(fast.encode_text(texts), model.encode_text(texts), TEXT_BOUND)
    assert_same(fast.logit_scale, model.logit_scale)
    expected, result = model(images, texts), fast(images, texts)
    if output_dict:
        assert list(result) == list(expected)
        expected, result = list(expected.values()), list(result.values())
    assert len(result) == len(expected)
    assert_same(result[0], fast.encode_image(images, normalize=True))
    assert_within(result[1], expected[1], TEXT_BOUND)
    for actual, wanted in zip(result[2:], expected[2:], strict=True):
        assert_same(actual, wanted)
    assert_same(fast.get_logits(images, texts)[0].T, fast.get_logits(images, texts)[1])


@torch.no_grad()
def test_output_tokens():
    model = make_model(vision={"output_tokens": True})
    fast = lraee.accelerate(model)
    for expected, result in zip(
        model.visual(make_images()), fast.visual(make_images()), strict=True
    ):
        assert result.shape == expected.shape
    images = make_images()
    expected, result = model.visual(images)[1], fast.visual(images)[1]
    assert F.cosine_similarity(result.flatten(1), expected.flatten(1)).min() > 0.999


@torch.no_grad()
def test_forward_intermediates(model):
    fast = lraee.accelerate(model)
    images, texts = make_images(2), make_texts()
    for options in ({}, {"image_indices": 2, "stop_early": True, "intermediates_only": True}):
        expected = model.forward_intermediates(images, texts, **options)
        result = fast.forward_intermediates(images, texts, **options)
        assert list(result) == list(expected)
        for actual, wanted in zip(
            result["image_intermediates"], expected["image_intermediates"], strict=True
        ):
            assert actual.shape == wanted.shape
            assert F.cosine_similarity(actual.flatten(), wanted.flatten(), 0) > 0.999
    full = fast.forward_intermediates(images)
    assert_same(full["image_features"], fast.encode_image(images, normalize=True))


@torch.no_grad()
def test_prune_intermediate_layers(model):
    fast = lraee.accelerate(model)
    fast.visual.prune_intermediate_layers([1], prune_head=False)
    assert len(blocks_of(fast)) == 2 and len(blocks_of(model)) == 3
    assert fast.encode_image(make_images()).isfinite().all()


@torch.no_grad()
def test_sequence_first_tower(model):
    images = make_images()
    expected = lraee.accelerate(model).encode_image(images)
    model.visual.transformer.batch_first = False
    for block in blocks_of(model):
        block.attn.batch_first = False
    assert_same(lraee.accelerate(model).encode_image(images), expected)


@torch.no_grad()
def test_a_nan_image_touches_no_other(model):
    fast = lraee.accelerate(model)
    images = make_images(4)
    expected = fast.encode_image(images)
    images[2, 0, 3, 3] = torch.nan
    result = fast.encode_image(images)
    assert result[2].isnan().all()
    for row in (0, 1, 3):
        assert_same(result[row], expected[row])


def test_a_wrong_image_is_refused_as_open_clip_does(model):
    fast = lraee.accelerate(model)
    for image in (torch.randn(1, 3, 48, 48), torch.randn(1, 1, 32, 32)):
        errors = []
        for either in (model, fast):
            with pytest.raises(RuntimeError) as caught:
                either.encode_image(image)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


@torch.no_grad()
def test_gradient_checkpointing_setting_is_harmless(model):
    fast = lraee.accelerate(model)
    images = make_images()
    expected = fast.encode_image(images)
    fast.set_grad_checkpointing()
    assert_same(fast.encode_image(images), expected)


def test_answers_are_the_same_with_gradients_on(model):
    fast = lraee.accelerate(model)
    images = make_images()
    result = fast.encode_image(images).detach()
    with torch.no_grad():
        assert_same(result, fast.encode_image(images))


# Compile


@torch.no_grad()
def test_compile_has_no_graph_break(model):
    fast = lraee.accelerate(model)
    images = make_images(2)
    expected = fast.encode_image(images)
    torch._dynamo.reset()
    compiled = torch.compile(fast.encode_image, fullgraph=True, backend="aot_eager")
    assert_same(compiled(images), expected)
    other = make_images(3)
    assert_same(compiled(other), fast.encode_image(other))


@pytest.mark.slow
@torch.no_grad()
def test_compile_with_inductor(model):
    fast = lraee.accelerate(model)
    images = make_images(2)
    torch._dynamo.reset()
    compiled = torch.compile(fast.encode_image, fullgraph=True)
    result, expected = compiled(images), fast.encode_image(images)
    assert F.cosine_similarity(result, expected).min() > 0.9999


# Options and refusals


@torch.no_grad()
def test_backends_agree(model):
    images = make_images()
    auto = lraee.accelerate(model).encode_image(images)
    reference = lraee.accelerate(model, backend="reference").encode_image(images)
    assert F.cosine_similarity(auto, reference).min() > 0.99999


@torch.no_grad()
def test_paper_scheme(model):
    images = make_images()
    fast = lraee.accelerate(model, scheme="paper")
    assert F.cosine_similarity(fast.encode_image(images), model.encode_image(images)).min() > 0.98
    assert sum(isinstance(m, Int8Linear) for m in fast.modules()) == 12


@torch.no_grad()
def test_paper_scheme_is_torchs_quantize_dynamic():
    """open_clip's own raw-projection block, each of its four linears replaced by torch's module.

    Differences are float rounding that moves a value to the next step of 127: see the bound.
    """
    model = make_model(vision={"block_type": "custom"})
    images = make_images()
    theirs = copy.deepcopy(model)
    for block in blocks_of(theirs):
        in_proj = nn.Linear(64, 192)
        in_proj.weight, in_proj.bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        block.attn.in_proj = in_proj
        block.attn.forward = _forward_with_linears.__get__(block.attn)
    torch.ao.quantization.quantize_dynamic(theirs.visual.transformer, {nn.Linear}, inplace=True)
    expected = theirs.encode_image(images)
    result = lraee.accelerate(model, scheme="paper").encode_image(images)
    float_error = (model.encode_image(images) - expected).norm()
    assert (result - expected).norm() < 0.25 * float_error
    assert F.cosine_similarity(result, expected).min() > 0.9999


def _forward_with_linears(self, x, attn_mask=None):
    N, L, D = x.shape
    q, k, v = self.in_proj(x).reshape(N, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return self.out_proj(y.transpose(1, 2).reshape(N, L, D))


def test_refusals_are_one_line(model):
    fast = lraee.accelerate(model)
    cases = [
        (lambda: lraee.accelerate(fast), ValueError, "got one that is accelerated already"),
        (
            lambda: lraee.accelerate(model, scheme="int4"),
            ValueError,
            "scheme must be one of int8, int8-p",
        ),
        (
            lambda: lraee.accelerate(model, backend="gpu"),
            ValueError,
            "backend must be one of auto, r",
        ),
        (lambda: lraee.accelerate(model, backend="triton"), RuntimeError, "needs a model on cuda"),
        (
            lambda: lraee.accelerate(make_model().train()),
            ValueError,
            "must be in eval mode, got tr",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_cpu_backend(model):
    if torch._C._dispatch_has_kernel_for_dispatch_key("lraee::int8_linear", "CPU"):
        images = make_images()
        result = lraee.accelerate(model, backend="cpu").encode_image(images)
        assert_same(result.detach(), lraee.accelerate(model).encode_image(images).detach())
        with pytest.raises(RuntimeError, match="needs a model on cpu, this one is on meta"):
            lraee.accelerate(model, backend="cpu").to("meta")
    else:
        with pytest.raises(RuntimeError, match="the C.. extension is not available"):
            lraee.accelerate(model, backend="cpu")


def test_one_line_is_logged(model, caplog):
    with caplog.at_level(logging.INFO, logger="lraee"):
        fast = lraee.accelerate(model, backend="reference")
    share = 100 * flops.count_macs(fast.visual).share
    assert [r.getMessage() for r in caplog.records if r.name == "lraee"] == [
        f"accelerate: 12 of 12 linears in int8, {share:.1f} % of the tower's multiply-adds in int8"
        " operators, implementation reference"
    ]


# Fidelity guard


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_check_passes_a_healthy_model(model, inplace):
    images = make_images(40)
    expected = lraee.accelerate(model).encode_image(images)
    result = lraee.accelerate(model, check=images, inplace=inplace)
    assert_same(result.encode_image(images), expected)


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_check_raises_and_leaves_the_model_float(model, inplace, monkeypatch):
    def four_bits(weight, scheme, backend):
        scale = weight.abs().amax(1) / 3
        return (weight / scale[:, None]).round().to(torch.int8), scale

    monkeypatch.setattr(build, "quantize_weight", four_bits)
    images = make_images(8)
    expected = model.encode_image(images)
    with pytest.raises(lraee.FidelityError, match="must be at least .* on the check images"):
        lraee.accelerate(model, check=images, inplace=inplace)
    assert_same(model.encode_image(images), expected)
    model.train()


@torch.no_grad()
def test_check_on_the_real_model():
    from tests.photos import photo_crops

    model, photos = make_lraee_tiny(), photo_crops(6)
    fast = lraee.accelerate(model, check=photos)
    texts = torch.randint(1, 49000, (4, 24))
    assert_within(fast.encode_text(texts), model.encode_text(texts), TEXT_BOUND)
