"""The dose keeps the float function and makes quantization noise grow."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lraee.calibration.collect import Pair
from lraee.study.backbones import backbone
from lraee.study.dose.outliers import check_float, dosed
from lraee.study.smooth import next_weights
from lraee.towers.families import block_specs, blocks_of, find_tower
from tests.small_calibration import classes_of, pictures, small_clip
from tests.support import assert_same


@torch.no_grad()
def embeddings(model: nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.encode_image(pictures(24))
    return result


@pytest.mark.parametrize("scale", [1.0, 0.5, 8.0, 32.0])
def test_a_power_of_two_keeps_every_bit_in_float(scale: float) -> None:
    model = small_clip()
    assert_same(embeddings(dosed(model, scale)), embeddings(model), scale=scale)


@pytest.mark.parametrize("scale", [3.0, 24.0, 40.0])
def test_another_dose_keeps_float_within_rounding(scale: float) -> None:
    model, images = small_clip(), pictures(24)
    classes = classes_of(model, images)
    check = check_float(model, dosed(model, scale, seed=1), images, classes)
    assert check.photos == check.same_answers == 24
    assert 0.0 < check.largest_error < 1e-5


def test_the_drawn_channels_alone_change_and_the_model_stays() -> None:
    model = small_clip()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = dosed(model, 16.0, channels=3, seed=5)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)
    tower, other = find_tower(model), find_tower(changed)
    for block, new, spec in zip(
        blocks_of(tower), blocks_of(other), block_specs(tower), strict=True
    ):
        for name, weights in next_weights(block, spec).items():
            ratio = new.get_submodule(name).weight / block.get_submodule(name).weight
            chosen = ratio != 1.0
            assert int(chosen.sum()) == 3 and bool((ratio[chosen] == 16.0).all())
            for weight, new_weight in zip(weights, next_weights(new, spec)[name], strict=True):
                assert_same(new_weight[:, chosen] * 16.0, weight[:, chosen])
                assert_same(new_weight[:, ~chosen], weight[:, ~chosen])


def test_channels_are_those_of_the_seed() -> None:
    model = small_clip()
    states = [dosed(model, 4.0, seed=seed).state_dict() for seed in (0, 0, 1)]
    name = next(name for name in states[0] if name.endswith("resblocks.0.ln_1.weight"))
    assert_same(states[0][name], states[1][name])
    assert bool((states[0][name] != states[2][name]).any())


@pytest.mark.parametrize("scheme", ["paper", "int8"])
def test_noise_grows_with_the_dose(scheme: str) -> None:
    model, images = small_clip(), pictures(32)
    noise = []
    for scale in (1.0, 16.0, 64.0):
        fast = backbone(dosed(model, scale), scheme)
        rows = Pair(model, fast, images, batch=32, progress=False).noise(32)
        noise.append(sum(row.nsr for row in rows) / len(rows))
    assert all(less < more for less, more in pairwise(noise)), noise


def test_refuses_what_is_no_dose() -> None:
    model = small_clip()
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="dosed: scale must be a finite number above 0"):
            dosed(model, scale)
    for channels in (0, 33):
        with pytest.raises(ValueError, match="channels must be 1 to 32"):
            dosed(model, 2.0, channels=channels)
