"""The shipped model's weights in timm's class: the answers of open_clip's path."""

from functools import partial
from typing import cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

import lraee
from lraee import zoo
from lraee.towers.prompts import class_features
from tests.photos import photo_crops


@pytest.fixture(scope="module")
def loaded() -> tuple[nn.Module, VisionTransformer, Tensor]:
    """lraee-tiny, its image tower as timm's VisionTransformer, and features of its classes."""
    model, _, tokenizer = zoo.load("lraee-tiny")
    names = zoo.class_names("lraee-tiny")[:50]
    classes = class_features(model, tokenizer, names, progress=False)
    return model, in_timm(model), classes.clone()


def in_timm(model: nn.Module) -> VisionTransformer:
    trunk = VisionTransformer(
        img_size=56, patch_size=8, embed_dim=192, depth=12, num_heads=3, num_classes=256,
        pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    state = checkpoint_filter_fn(cast(dict[str, Tensor], model.state_dict()), trunk)
    trunk.load_state_dict(state)
    return trunk.eval().requires_grad_(False)


def test_float_models_agree(loaded: tuple[nn.Module, VisionTransformer, Tensor]) -> None:
    model, trunk, _ = loaded
    x = photo_crops(6)
    expected = model.encode_image(x)  # type: ignore[operator]
    torch.testing.assert_close(trunk(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
def test_int8_models_agree(
    loaded: tuple[nn.Module, VisionTransformer, Tensor], scheme: str
) -> None:
    """The same int8 weights and operators: what differs is where float32 rounds between them."""
    model, trunk, classes = loaded
    x = photo_crops(12)
    expected = lraee.accelerate(model, scheme=scheme).encode_image(x)  # type: ignore[operator]
    y = lraee.accelerate(trunk, scheme=scheme)(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal((y @ classes.T).argmax(1), (expected @ classes.T).argmax(1))
    float_top = (trunk(x) @ classes.T).argmax(1)
    assert ((y @ classes.T).argmax(1) == float_top).float().mean() > 0.9
