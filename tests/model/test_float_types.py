"""Every call on models whose parameters have several float types, and after casts."""

import copy
from pathlib import Path

import pytest
import torch
from open_clip.model import convert_weights_to_lp
from torch import Tensor, nn

import lraee
from lraee.towers.families import compute_dtype
from tests.clip_models import make_images, make_model
from tests.small_calibration import LAYERS, QUICK, E, calibrated, classes_of, pictures
from tests.support import assert_same

HALF_TYPES = [torch.float16, torch.bfloat16]
VISION = {"layers": LAYERS, "width": 32}


def _mixed(dtype: torch.dtype) -> nn.Module:
    """As open_clip's precision "fp16" and "bf16": linears of `dtype`, norms float32."""
    torch.manual_seed(0)
    model = make_model(vision=VISION, embed_dim=E, cast_dtype=dtype)
    convert_weights_to_lp(model, dtype)
    assert {p.dtype for p in model.visual.parameters()} == {dtype, torch.float32}
    return model


def _pure(dtype: torch.dtype) -> nn.Module:
    """As "pure_fp16" and "pure_bf16"."""
    torch.manual_seed(0)
    return make_model(vision=VISION, embed_dim=E).to(dtype)


@torch.no_grad()
def _encode(model: nn.Module, images: Tensor) -> Tensor:
    return model.encode_image(images.to(model.visual.conv1.weight.dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("make", [_mixed, _pure])
@pytest.mark.parametrize("scheme", ["int8", "int8-patches", "paper"])
def test_check_compares_in_the_type_of_the_model(make, dtype, scheme) -> None:
    model = make(dtype)
    try:
        fast = lraee.accelerate(model, scheme=scheme, check=make_images(8))
    except lraee.FidelityError:
        assert scheme == "paper"  # what it exists to show
        return
    assert compute_dtype(fast) == compute_dtype(model) == dtype


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("make", [_mixed, _pure])
def test_calibrate_save_load_restore(tmp_path: Path, make, dtype) -> None:
    model, images = make(dtype), pictures(120)
    classes = classes_of(model, images.to(dtype)).float()
    exits = calibrated(model, images, classes=classes)
    fast = lraee.accelerate(model, exits=exits)
    with lraee.trace(fast) as t:
        expected = _encode(fast, images[:16])
    assert expected.dtype == dtype and t.scores.shape[0] == 16
    lraee.save(fast, tmp_path / "saved")
    assert_same(_encode(lraee.load(tmp_path / "saved", model), images[:16]), expected)
    with lraee.full_depth(fast):
        assert_same(_encode(fast, images[:4]), _encode(lraee.accelerate(model), images[:4]))
    assert_same(_encode(lraee.restore(fast), images[:4]), _encode(model, images[:4]))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
def test_restore_after_a_cast_is_the_float_model_cast(dtype, scheme) -> None:
    torch.manual_seed(0)
    model = make_model(vision=VISION, embed_dim=E)
    fast = lraee.accelerate(model, scheme=scheme).to(dtype)
    restored, expected = lraee.restore(fast), copy.deepcopy(model).to(dtype)
    state = restored.state_dict()
    for name, tensor in expected.state_dict().items():
        assert_same(state[name], tensor, name=name)
    images = make_images(2)
    assert_same(_encode(restored, images), _encode(expected, images))
    again = lraee.restore(fast.float()).visual.state_dict()  # norms rounded since are made good
    for name, tensor in model.visual.state_dict().items():
        assert_same(again[name], tensor, name=name)


def test_restore_of_a_mixed_model_keeps_each_type() -> None:
    model = _mixed(torch.bfloat16)
    state = lraee.restore(lraee.accelerate(model)).state_dict()
    for name, tensor in model.state_dict().items():
        assert_same(state[name], tensor, name=name)


@pytest.mark.parametrize("make", [_mixed, _pure])
def test_save_after_a_cast_says_what_to_do(tmp_path: Path, make) -> None:
    model = make(torch.bfloat16)
    lraee.save(lraee.accelerate(model), tmp_path / "as it was")
    for cast in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="save: model must be of the type it was accelerated"):
            lraee.save(lraee.accelerate(model).to(cast), tmp_path / "cast")
    assert not (tmp_path / "cast").exists()


def test_calibrate_takes_a_model_that_was_cast() -> None:
    torch.manual_seed(0)
    model, images = make_model(vision=VISION, embed_dim=E), pictures(120)
    fast = lraee.accelerate(model).bfloat16()
    exits = lraee.calibrate(
        fast, images, teacher=model, recipe=QUICK, is_timed=False, progress=False
    )
    faster = lraee.accelerate(model, exits=exits).bfloat16()
    assert _encode(faster, images[:2]).dtype == torch.bfloat16


def test_float64_is_refused() -> None:
    torch.manual_seed(0)
    model = make_model(vision=VISION, embed_dim=E)
    with pytest.raises(NotImplementedError, match=r"has weights of torch\.float64"):
        lraee.accelerate(copy.deepcopy(model).double())
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got float64"):
        _encode(lraee.accelerate(model).double(), make_images(2))
