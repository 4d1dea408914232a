"""Models in wrappers: looked into where that is sound, else refused in one line."""

import pytest
import torch
from torch import nn

import lraee
from lraee.towers.families import encode_image, find_tower, image_size
from tests.clip_models import make_model
from tests.support import assert_same


@torch.no_grad()
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_stay_wrapped(wrap: type[nn.Module]) -> None:
    """Nothing is compiled: an OptimizedModule hands its attributes on."""
    model = make_model(vision={"layers": 2})
    x = torch.randn(2, 3, *image_size(model))
    wrapped = wrap(model)
    fast = lraee.accelerate(wrapped)
    assert type(fast) is type(wrapped)
    assert_same(encode_image(fast, x), encode_image(lraee.accelerate(model), x))
    assert_same(encode_image(lraee.restore(fast), x), encode_image(model, x))


def test_models_of_jit_are_refused() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must not be of torch.jit, .*; pass the model that was"):
        lraee.accelerate(scripted)


def test_models_without_weights_are_refused() -> None:
    model = make_model(vision={"layers": 1}).to("meta")
    with pytest.raises(ValueError, match=r"must have weights, got .* on the meta device"):
        lraee.accelerate(model)


@torch.no_grad()
def test_adapters_must_be_merged() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from tests.towers.hugging_face_models import make, pictures

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("CLIPModel"), config).eval()
    with pytest.raises(TypeError, match=r"adapters merged, got .* of PEFT at .*merge_and_unload"):
        lraee.accelerate(model)
    merged = model.merge_and_unload()
    x = pictures(2)
    y, expected = encode_image(lraee.accelerate(merged), x), encode_image(merged, x)
    assert (y - expected).norm() / expected.norm() < 0.03
    assert type(find_tower(merged)).__name__ == "CLIPModel"
