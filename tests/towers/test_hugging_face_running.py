"""Early exits of transformers' vision models, by each of their entries; NaFlex and its masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers.families import encode_image
from lraee.towers.hugging_face_running import patches_of
from tests.exits.random_exits import make_exits
from tests.support import assert_same
from tests.towers.hugging_face_models import IS_5, PREFIX, accelerated, make, pictures

EXITS = (
    "CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "Siglip2VisionModel", "ViTModel",
    "Dinov2WithRegistersModel", "DINOv3ViTModel", "BlipModel", "OwlViTModel", "LLaVA",
)  # fmt: skip


def _with_exits(name: str) -> tuple[nn.Module, nn.Module]:
    model = make(name)
    return model, lraee.accelerate(model, exits=make_exits(model))


@torch.no_grad()
@pytest.mark.parametrize("name", EXITS)
def test_exits_are_traced_and_saved(name: str, tmp_path: Path) -> None:
    assert PREFIX.get(name, 1) in (0, 1, 5)
    model, fast = _with_exits(name)
    x = pictures(12)
    with lraee.trace(fast) as t:
        y = encode_image(fast, x)
    assert t.exit_block.min() < 3 and t.flops_saved > 0
    assert_same(encode_image(fast, x[4:5]), y[4:5])
    with lraee.full_depth(fast):
        assert_same(encode_image(fast, x), encode_image(accelerated(name), x))
    lraee.save(fast, tmp_path)
    assert_same(encode_image(lraee.load(tmp_path, model), x), y)
    assert_same(encode_image(lraee.restore(fast), x), encode_image(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "DINOv3ViTModel"])
def test_exits_are_calibrated(name: str) -> None:
    model = make(name)
    options = {"gate": "static", "budget": 0.8, "is_timed": False, "progress": False}
    fast = lraee.accelerate(model, exits=lraee.calibrate(model, pictures(120), **options))
    with torch.no_grad(), lraee.trace(fast) as t:
        encode_image(fast, pictures(6))
    assert t.exit_block.min() < 3


@torch.no_grad()
def test_each_entry_of_a_dual_model_leaves_early() -> None:
    _, fast = _with_exits("CLIPModel")
    x, ids = pictures(6), torch.tensor([[1, 5, 6, 2]])
    with lraee.trace(fast) as t:
        features = fast.get_image_features(pixel_values=x)
        output = fast(input_ids=ids, pixel_values=x)
    assert len(t.exit_block) == 12
    y = features.pooler_output if IS_5 else features
    torch.testing.assert_close(output.image_embeds, y / y.norm(dim=-1, keepdim=True))
    with lraee.full_depth(fast):
        whole = fast(input_ids=ids, pixel_values=x)
    assert_same(whole.image_embeds, accelerated("CLIPModel")(ids, x).image_embeds)
    assert not torch.equal(whole.image_embeds, output.image_embeds)
    # the vision model alone gives tokens, so it always runs whole
    expected = accelerated("CLIPModel").vision_model(pixel_values=x)
    assert_same(fast.vision_model(pixel_values=x).last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_outputs_that_no_early_image_has_are_refused() -> None:
    _, fast = _with_exits("ViTModel")
    x = pictures(2)
    assert fast(pixel_values=x).last_hidden_state is None
    assert fast(x, return_dict=False)[0] is None
    with pytest.raises(NotImplementedError, match=r"exits: output_hidden_states .*full_depth"):
        fast(pixel_values=x, output_hidden_states=True)
    with lraee.full_depth(fast):
        assert len(fast(pixel_values=x, output_hidden_states=True).hidden_states) == 4
    larger = torch.randn(2, 3, 48, 40)
    assert fast(pixel_values=larger, interpolate_pos_encoding=True).pooler_output.shape == (2, 64)


# NaFlex


def _naflex(images: list[Tensor], length: int, filling: float = 0.0) -> dict[str, Tensor]:
    """Images of any size, padded to so many patches by a value."""
    parts = [patches_of(image[None], (8, 8)) for image in images]
    B, K = len(images), parts[0]["pixel_values"].shape[2]
    values = torch.full((B, length, K), filling)
    mask = torch.zeros(B, length, dtype=torch.int64)
    for b, part in enumerate(parts):
        n = part["pixel_values"].shape[1]
        values[b, :n], mask[b, :n] = part["pixel_values"][0], 1
    shapes = torch.cat([part["spatial_shapes"] for part in parts])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _sized() -> list[Tensor]:
    sizes = [(32, 32), (16, 40), (24, 24), (40, 16)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@torch.no_grad()
@pytest.mark.parametrize("name", ["Siglip2Model", "Siglip2VisionModel"])
def test_padding_never_changes_a_result(name: str) -> None:
    model, fast, images = make(name), accelerated(name), _sized()
    entry = (lambda m: m.get_image_features) if name == "Siglip2Model" else (lambda m: m)
    y = _pooled(entry(fast)(**_naflex(images, 16)))
    expected = _pooled(entry(model)(**_naflex(images, 16)))
    assert (y - expected).norm() / expected.norm() < 0.03
    for length, filling in ((16, 7.0), (21, 0.0), (64, torch.nan)):
        assert_same(_pooled(entry(fast)(**_naflex(images, length, filling))), y)
    for i, image in enumerate(images):
        n = (image.shape[1] // 8) * (image.shape[2] // 8)
        assert_same(_pooled(entry(fast)(**_naflex([image], n)))[0], y[i])


@torch.no_grad()
def test_valid_tokens_are_close_to_those_of_the_float_model() -> None:
    model, fast, given = make("Siglip2VisionModel"), accelerated("Siglip2VisionModel"), None
    given = _naflex(_sized(), 20)
    valid = given["pixel_attention_mask"].bool()
    expected = model(**given).last_hidden_state[valid]
    y = fast(**given).last_hidden_state[valid]
    assert 0 < (y - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_images_of_any_size_leave_early() -> None:
    _, fast = _with_exits("Siglip2Model")
    with lraee.trace(fast) as t:
        y = _pooled(fast.get_image_features(**_naflex(_sized(), 30)))
    assert len(t.exit_block) == 4
    for i, image in enumerate(_sized()):
        assert_same(_pooled(fast.get_image_features(**_naflex([image], 30)))[0], y[i])


@torch.no_grad()
def test_wrong_masks_and_shapes_are_one_line() -> None:
    fast, good = accelerated("Siglip2VisionModel"), _naflex(_sized(), 20)
    mask = good["pixel_attention_mask"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"pixel_attention_mask": mask[:, :5]}, r"pixel_attention_mask must be \[B, N\]"),
        ({"pixel_attention_mask": 1 - mask}, "pixel_attention_mask must show the first"),
        ({"spatial_shapes": good["spatial_shapes"] * 9}, "spatial_shapes must be at least 1"),
        ({"spatial_shapes": good["spatial_shapes"][:2]}, "spatial_shapes must be rows and columns"),
        (
            {"pixel_values": torch.randn(4, 3, 32, 32)},
            r"pixel_values must be patches",
        ),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message) as error:
            fast(**{**good, **change})
        assert "\n" not in str(error.value)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
