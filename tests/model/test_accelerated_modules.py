"""The public face: an accelerated model as a tree of modules: hooks, and train refused."""

import pytest
import torch
import torch.nn.functional as F

import lraee
from tests.clip_models import blocks_of, make_images, make_model


@pytest.fixture
def model():
    return make_model()


# Hooks


@torch.no_grad()
def test_hooks_registered_before_are_carried_over(model):
    recorded = []
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
        module.register_forward_hook(lambda _m, _x, _y, name=name: recorded.append(name))
    model.encode_image(images)
    expected, recorded[:] = list(recorded), []
    fast = lraee.accelerate(model)
    fast.encode_image(images)
    assert recorded == expected and set(recorded) == set(names)
    lraee.restore(fast).encode_image(images)
    assert recorded == expected + expected


@torch.no_grad()
def test_inplace_keeps_the_handles_of_hooks(model):
    recorded = []
    handle = blocks_of(model)[1].mlp.register_forward_hook(lambda *_: recorded.append(1))
    fast = lraee.accelerate(model, inplace=True)
    fast.encode_image(make_images(2))
    assert recorded == [1]
    handle.remove()
    fast.encode_image(make_images(2))
    assert recorded == [1]


@torch.no_grad()
def test_hooks_on_the_fast_model(model):
    fast = lraee.accelerate(model)
    images = make_images()
    plain = fast.encode_image(images)
    recorded = {}
    for name in ("visual", "visual.transformer.resblocks.1", "visual.transformer.resblocks.1.mlp"):
        for either in (model, fast):
            either.get_submodule(name).register_forward_hook(
                lambda _m, _x, y, key=(name, either is fast): recorded.update({key: y})
            )
    result = fast.encode_image(images)
    model.encode_image(images)
    assert F.cosine_similarity(result, plain).min() > 0.9999
    assert len(recorded) == 6
    for (name, _), value in recorded.items():
        assert F.cosine_similarity(value.flatten(), recorded[name, False].flatten(), 0) > 0.999


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
