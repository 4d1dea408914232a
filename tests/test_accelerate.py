"""The public face: every promise that design makes of an accelerated model."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import convert_weights_to_lp
from torch import nn

import lraee
from lraee import towers
from lraee.accelerate import acceleration_of
from lraee.linear import Int8Linear
from lraee.modules import Int8Block
from lraee.quantize import Scheme
from tests.clip_models import VARIANTS, make_images, make_lraee_tiny, make_model, make_texts
from tests.support import assert_same


@pytest.fixture
def model():
    return make_model()


def blocks_of(model):
    return towers.blocks_of(towers.find_tower(model))


def features_of(output):
    return output[0] if isinstance(output, tuple) else output


# Same answers


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_embeddings_agree_with_float(variant):
    model = make_model(**VARIANTS[variant])
    images = make_images()
    fast = lraee.accelerate(model)
    expected, found = model.encode_image(images), fast.encode_image(images)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert F.cosine_similarity(found.flatten(1), expected.flatten(1)).min() > 0.999
    normal = fast.encode_image(images, normalize=True)
    assert_same(normal, F.normalize(found, dim=-1))
    assert all(isinstance(block, Int8Block) and block.can_fuse for block in blocks_of(fast))


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("variant", ["plain", "custom_text", "logit_bias"])
@torch.no_grad()
def test_forward_and_text_are_as_before(variant, output_dict):
    model = make_model(**VARIANTS[variant], output_dict=output_dict)
    fast = lraee.accelerate(model)
    images, texts = make_images(2), make_texts()
    assert type(fast) is type(model)
    assert_same(fast.encode_text(texts), model.encode_text(texts))
    assert_same(fast.logit_scale, model.logit_scale)
    expected, found = model(images, texts), fast(images, texts)
    if output_dict:
        assert list(found) == list(expected)
        expected, found = list(expected.values()), list(found.values())
    assert len(found) == len(expected)
    assert_same(found[0], fast.encode_image(images, normalize=True))
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        assert_same(actual, wanted)
    assert_same(fast.get_logits(images, texts)[0].T, fast.get_logits(images, texts)[1])


@torch.no_grad()
def test_output_tokens():
    model = make_model(vision={"output_tokens": True})
    fast = lraee.accelerate(model)
    for expected, found in zip(
        model.visual(make_images()), fast.visual(make_images()), strict=True
    ):
        assert found.shape == expected.shape
    images = make_images()
    expected, found = model.visual(images)[1], fast.visual(images)[1]
    assert F.cosine_similarity(found.flatten(1), expected.flatten(1)).min() > 0.999


@torch.no_grad()
def test_forward_intermediates(model):
    fast = lraee.accelerate(model)
    images, texts = make_images(2), make_texts()
    for options in ({}, {"image_indices": 2, "stop_early": True, "intermediates_only": True}):
        expected = model.forward_intermediates(images, texts, **options)
        found = fast.forward_intermediates(images, texts, **options)
        assert list(found) == list(expected)
        for actual, wanted in zip(
            found["image_intermediates"], expected["image_intermediates"], strict=True
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
    found = fast.encode_image(images)
    assert found[2].isnan().all()
    for row in (0, 1, 3):
        assert_same(found[row], expected[row])


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
    found = fast.encode_image(images).detach()
    with torch.no_grad():
        assert_same(found, fast.encode_image(images))


# The original


@torch.no_grad()
def test_the_original_is_untouched(model):
    images = make_images()
    before = model.encode_image(images)
    state = copy.deepcopy(model.state_dict())
    parts = [(name, id(m)) for name, m in model.named_modules()]
    fast = lraee.accelerate(model)
    fast.visual.conv1.weight.mul_(2)
    for buffer in blocks_of(fast).buffers():
        buffer.zero_()
    for parameter in fast.parameters():
        parameter.zero_()
    assert_same(model.encode_image(images), before)
    assert parts == [(name, id(m)) for name, m in model.named_modules()]
    for name, value in model.state_dict().items():
        assert_same(value, state[name])
    model.train()


@torch.no_grad()
def test_inplace_changes_the_model_itself(model):
    images = make_images()
    expected = lraee.accelerate(model).encode_image(images)
    float_weights = [weakref.ref(p) for p in blocks_of(model).parameters() if p.dim() == 2]
    norm = blocks_of(model)[0].ln_1
    fast = lraee.accelerate(model, inplace=True)
    assert fast is model and blocks_of(model)[0].ln_1 is norm
    assert_same(fast.encode_image(images), expected)
    assert all(weight() is None for weight in float_weights)


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_weights_take_a_quarter_and_float_copies_are_freed():
    """0.27 at the width of a real tower: 1 byte a weight and 8 an output, with K >= 768."""
    model = make_model(vision={"width": 768, "layers": 1, "head_width": 64})
    block = blocks_of(model)[0]
    float_bytes = _bytes(p for p in block.parameters() if p.dim() == 2)
    fast = lraee.accelerate(model)
    linears = [m for m in blocks_of(fast).modules() if isinstance(m, Int8Linear)]
    int8_bytes = sum(_bytes((m.w, m.w_scale, m.w_sum)) for m in linears)
    assert int8_bytes <= 0.27 * float_bytes

    assert not any(p.dim() == 2 for p in blocks_of(fast).parameters())
    held = [t for t in _live_tensors() if t.dim() == 2 and t.is_floating_point()]
    known = {id(p) for p in model.parameters()} | {id(p) for p in fast.parameters()}
    assert _bytes(t for t in held if id(t) not in known) < 0.01 * float_bytes

    weights = [weakref.ref(p) for p in block.parameters()]
    del model, block, known, held
    assert all(weight() is None for weight in weights)
    assert lraee.accelerate is not None and fast is not None


def _live_tensors():
    gc.collect()
    return [
        t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta
    ]


def test_an_accelerated_model_is_freed_without_the_collector(model):
    fast = lraee.accelerate(model)
    gone = weakref.ref(blocks_of(fast)[0])
    gc.disable()
    try:
        del fast
        assert gone() is None
    finally:
        gc.enable()


# Restore


def assert_restored(restored, original):
    assert type(restored) is type(original)
    assert [n for n, _ in restored.named_modules()] == [n for n, _ in original.named_modules()]
    state = restored.state_dict()
    assert list(state) == list(original.state_dict())
    for name, value in original.state_dict().items():
        assert_same(state[name], value, name=name)
        assert state[name].data_ptr() != value.data_ptr()
    flags = [p.requires_grad for p in original.parameters()]
    assert [p.requires_grad for p in restored.parameters()] == flags
    images, texts = make_images(), make_texts()
    with torch.no_grad():
        assert_same(restored.encode_image(images), original.encode_image(images))
        assert_same(restored.encode_text(texts), original.encode_text(texts))
    assert acceleration_of(restored) is None
    restored.train()
    assert restored.visual.transformer.resblocks[0].training


@pytest.mark.parametrize("variant", ["plain", "custom_text", "raw_layer_scale", "attentional_pool"])
def test_restore_is_bit_for_bit(variant):
    model = make_model(**VARIANTS[variant])
    model.visual.conv1.weight.requires_grad_(False)
    blocks_of(model)[1].mlp.c_fc.weight.requires_grad_(False)
    fast = lraee.accelerate(model)
    expected = fast.encode_image(make_images(2))
    assert_restored(lraee.restore(fast), model)
    assert_restored(lraee.restore(copy.deepcopy(fast)), model)
    assert blocks_of(fast)[0].can_fuse and acceleration_of(fast) is not None
    assert fast.encode_image(make_images(2)).shape == expected.shape
    again = lraee.accelerate(lraee.restore(fast))
    images = make_images()
    assert_same(again.encode_image(images), fast.encode_image(images))


def test_restore_without_the_original(model):
    state = copy.deepcopy(model.state_dict())
    base = copy.deepcopy(model)
    fast = lraee.accelerate(model, inplace=True)
    other = pickle.loads(pickle.dumps(fast))
    for each in (fast, other):
        with pytest.raises(LookupError, match="restore: the original model is gone, .* give base="):
            lraee.restore(each)
        assert_restored(lraee.restore(each, base), base)
        assert_restored(lraee.restore(each, state), base)
        tower_state = {k.removeprefix("visual."): v for k, v in state.items() if "visual." in k}
        assert_restored(lraee.restore(each, tower_state), base)


def test_restore_after_the_original_died():
    model = make_model()
    fast = lraee.accelerate(model)
    del model
    with pytest.raises(LookupError, match="the original model is gone"):
        lraee.restore(fast)


def test_restore_refuses_changed_weights(model):
    base = copy.deepcopy(model)
    fast = lraee.accelerate(model)
    with torch.no_grad():
        blocks_of(model)[2].mlp.c_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match="restore: the original model must hold the weights that"):
        lraee.restore(fast)
    assert_restored(lraee.restore(fast, base), base)
    with pytest.raises(ValueError, match="restore: base must hold the weights that accelerate saw"):
        lraee.restore(fast, model)
    with pytest.raises(ValueError, match="restore: base must hold the weights that accelerate saw"):
        lraee.restore(fast, {"visual.proj": model.visual.proj})


def test_restore_refuses_a_float_model(model):
    with pytest.raises(ValueError, match="restore: model must be accelerated, got a float one"):
        lraee.restore(model)


# Copies and files


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_deepcopy_and_pickle(model, again, backend):
    fast = lraee.accelerate(model, backend=backend)
    images = make_images()
    expected = fast.encode_image(images)
    twin = again(fast)
    assert_same(twin.encode_image(images), expected)
    assert acceleration_of(twin).scheme == Scheme()
    with pytest.raises(RuntimeError, match="train:"):
        twin.train()
    assert not any(m.training for m in twin.modules())
    assert twin.eval() is twin
    for buffer in blocks_of(twin).buffers():
        buffer.zero_()
    assert_same(fast.encode_image(images), expected)


@torch.no_grad()
def test_torch_save(model, tmp_path):
    fast = lraee.accelerate(model)
    torch.save(fast, tmp_path / "fast.pt")
    twin = torch.load(tmp_path / "fast.pt", weights_only=False)
    images = make_images()
    assert_same(twin.encode_image(images), fast.encode_image(images))


@torch.no_grad()
def test_deepcopy_of_a_part(model):
    fast = lraee.accelerate(model)
    images = make_images()
    assert_same(copy.deepcopy(fast.visual)(images), fast.visual(images))
    tower = copy.deepcopy(fast.visual)
    with pytest.raises(RuntimeError, match="train:"):
        tower.train()
    assert tower.eval() is tower


@torch.no_grad()
def test_state_dict_round_trip(model):
    source, target = lraee.accelerate(model), lraee.accelerate(make_model())
    state = source.state_dict()
    key = "visual.transformer.resblocks.0.mlp.c_fc"
    assert {f"{key}.w_q", f"{key}.w_scale", f"{key}.bias"} <= set(state)
    assert f"{key}.w" not in state and f"{key}.weight" not in state
    assert state[f"{key}.w_q"].shape == (256, 64)
    images = make_images()
    assert not target.encode_image(images).equal(source.encode_image(images))
    target.load_state_dict(state, strict=True)
    assert_same(target.encode_image(images), source.encode_image(images))
    for name, value in target.state_dict().items():
        assert_same(value, state[name])


# Casts and moves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_casts(model, dtype):
    fast = lraee.accelerate(model)
    images = make_images()
    expected = fast.encode_image(images)
    fast.to(dtype)
    found = fast.encode_image(images.to(dtype))
    assert found.dtype == dtype
    assert F.cosine_similarity(found.float(), expected).min() > 0.998
    assert fast.visual.transformer.get_cast_dtype() == dtype
    linears = [m for m in fast.modules() if isinstance(m, Int8Linear)]
    assert {m.w_scale.dtype for m in linears} | {m.bias.dtype for m in linears} == {torch.float32}
    assert fast.float().visual.transformer.get_cast_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_pure", [True, False])
@torch.no_grad()
def test_half_models_are_accelerated_as_they_are(dtype, is_pure):
    """open_clip's precision `pure_bf16`, and `bf16`, which keeps norms and their inputs float32."""
    model = make_model(cast_dtype=None if is_pure else dtype)
    if is_pure:
        model.to(dtype)
    else:
        convert_weights_to_lp(model, dtype)
        assert blocks_of(model)[0].ln_1.weight.dtype == torch.float32
    fast = lraee.accelerate(model)
    images = make_images().to(dtype)
    found, expected = fast.encode_image(images), model.encode_image(images)
    assert found.dtype == dtype
    assert F.cosine_similarity(found.float(), expected.float()).min() > 0.998


@torch.no_grad()
def test_autocast(model):
    fast = lraee.accelerate(model)
    images = make_images()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast.encode_image(images), model.encode_image(images)
    assert found.dtype == expected.dtype
    assert F.cosine_similarity(found.float(), expected.float()).min() > 0.998


def test_to_another_device(model):
    fast = lraee.accelerate(model).to("meta")
    assert {t.device.type for t in [*fast.visual.parameters(), *fast.visual.buffers()]} == {"meta"}


# Hooks


@torch.no_grad()
def test_hooks_registered_before_are_carried_over(model):
    seen = []
    names = [
        "",
        "ln_1",
        "attn",
        "ls_1",
        "ln_2",
        "mlp",
        "mlp.c_fc",
        "mlp.gelu",
        "mlp.c_proj",
        "ls_2",
    ]
    images = make_images(2)
    for name in names:
        module = blocks_of(model)[1].get_submodule(name)
        module.register_forward_hook(lambda _m, _x, _y, name=name: seen.append(name))
    model.encode_image(images)
    expected, seen[:] = list(seen), []
    fast = lraee.accelerate(model)
    fast.encode_image(images)
    assert seen == expected and set(seen) == set(names)
    lraee.restore(fast).encode_image(images)
    assert seen == expected + expected


@torch.no_grad()
def test_inplace_keeps_the_handles_of_hooks(model):
    seen = []
    handle = blocks_of(model)[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    fast = lraee.accelerate(model, inplace=True)
    fast.encode_image(make_images(2))
    assert seen == [1]
    handle.remove()
    fast.encode_image(make_images(2))
    assert seen == [1]


@torch.no_grad()
def test_hooks_on_the_fast_model(model):
    fast = lraee.accelerate(model)
    images = make_images()
    plain = fast.encode_image(images)
    seen = {}
    for name in ("visual", "visual.transformer.resblocks.1", "visual.transformer.resblocks.1.mlp"):
        for either in (model, fast):
            either.get_submodule(name).register_forward_hook(
                lambda _m, _x, y, key=(name, either is fast): seen.update({key: y})
            )
    found = fast.encode_image(images)
    model.encode_image(images)
    assert F.cosine_similarity(found, plain).min() > 0.9999
    assert len(seen) == 6
    for (name, _), value in seen.items():
        assert F.cosine_similarity(value.flatten(), seen[name, False].flatten(), 0) > 0.999


# Train


@pytest.mark.parametrize(
    "part", ["", "visual", "visual.transformer", "visual.transformer.resblocks"]
)
def test_train_is_refused_and_nothing_switches(model, part):
    fast = lraee.accelerate(model)
    flags = {name: m.training for name, m in fast.named_modules()}
    with pytest.raises(RuntimeError, match="train: an accelerated tower has int8 weights and no"):
        fast.get_submodule(part).train()
    assert flags == {name: m.training for name, m in fast.named_modules()}
    assert fast.get_submodule(part).eval() is fast.get_submodule(part)
    assert fast.get_submodule(part).train(False) is fast.get_submodule(part)


def test_the_text_tower_may_train(model):
    fast = lraee.accelerate(model)
    fast.transformer.train()
    assert fast.transformer.resblocks[0].training
    fast.eval()
    assert not any(m.training for m in fast.modules())


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
    found, expected = compiled(images), fast.encode_image(images)
    assert F.cosine_similarity(found, expected).min() > 0.9999


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
    found = lraee.accelerate(model, scheme="paper").encode_image(images)
    float_error = (model.encode_image(images) - expected).norm()
    assert (found - expected).norm() < 0.25 * float_error
    assert F.cosine_similarity(found, expected).min() > 0.9999


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
            "scheme must be one of int8, p",
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
        found = lraee.accelerate(model, backend="cpu").encode_image(images)
        assert_same(found.detach(), lraee.accelerate(model).encode_image(images).detach())
        with pytest.raises(RuntimeError, match="needs a model on cpu, this one is on meta"):
            lraee.accelerate(model, backend="cpu").to("meta")
    else:
        with pytest.raises(RuntimeError, match="the C.. extension is not available"):
            lraee.accelerate(model, backend="cpu")


def test_one_line_is_logged(model, caplog):
    with caplog.at_level(logging.INFO, logger="lraee"):
        fast = lraee.accelerate(model, backend="reference")
    share = 100 * towers.count_macs(fast.visual).share
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
    found = lraee.accelerate(model, check=images, inplace=inplace)
    assert_same(found.encode_image(images), expected)


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_check_raises_and_leaves_the_model_float(model, inplace, monkeypatch):
    def four_bits(weight, scheme, backend):
        scale = weight.abs().amax(1) / 3
        return (weight / scale[:, None]).round().to(torch.int8), scale

    monkeypatch.setattr(towers, "quantize_weight", four_bits)
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
    assert_same(fast.encode_text(texts), model.encode_text(texts))
