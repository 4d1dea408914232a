"""The public face: what holds the numbers: the original, copies, files, casts."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import convert_weights_to_lp
from torch import nn

import lraee
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import Scheme
from lraee.model.acceleration import acceleration_of
from tests.clip_models import blocks_of, make_images, make_model
from tests.support import assert_same


@pytest.fixture
def model():
    return make_model()


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
    before = _live_tensors()  # other tests' own, kept so that no id is used again
    model = make_model(vision={"width": 768, "layers": 1, "head_width": 64})
    block = blocks_of(model)[0]
    float_bytes = _bytes(p for p in block.parameters() if p.dim() == 2)
    fast = lraee.accelerate(model)
    linears = [m for m in blocks_of(fast).modules() if isinstance(m, Int8Linear)]
    int8_bytes = sum(_bytes((m.w, m.w_scale, m.w_sum)) for m in linears)
    assert int8_bytes <= 0.27 * float_bytes

    assert not any(p.dim() == 2 for p in blocks_of(fast).parameters())
    held = [t for t in _live_tensors() if t.dim() == 2 and t.is_floating_point()]
    known = {id(t) for t in (*before, *model.parameters(), *fast.parameters())}
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
    dropped = weakref.ref(blocks_of(fast)[0])
    gc.disable()
    try:
        del fast
        assert dropped() is None
    finally:
        gc.enable()


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
    result = fast.encode_image(images.to(dtype))
    assert result.dtype == dtype
    assert F.cosine_similarity(result.float(), expected).min() > 0.998
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
    result, expected = fast.encode_image(images), model.encode_image(images)
    assert result.dtype == dtype
    assert F.cosine_similarity(result.float(), expected.float()).min() > 0.998


@torch.no_grad()
def test_autocast(model):
    fast = lraee.accelerate(model)
    images = make_images()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = fast.encode_image(images), model.encode_image(images)
    assert result.dtype == expected.dtype
    assert F.cosine_similarity(result.float(), expected.float()).min() > 0.998


def test_to_another_device(model):
    fast = lraee.accelerate(model).to("meta")
    assert {t.device.type for t in [*fast.visual.parameters(), *fast.visual.buffers()]} == {"meta"}
