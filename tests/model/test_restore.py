"""restore: the float model again, bit for bit."""

import copy
import pickle

import pytest
import torch

import lraee
from lraee.model.acceleration import acceleration_of
from tests.clip_models import VARIANTS, blocks_of, make_images, make_model, make_texts
from tests.support import assert_same


@pytest.fixture
def model():
    return make_model()


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
