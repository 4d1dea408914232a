"""A checkpoint holds the early exits of its model: they come back, or the file is refused."""

import copy
import hashlib
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import lraee
from lraee import CheckpointError
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.model.acceleration import acceleration_of
from lraee.model.checkpoint import FORMAT
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.sealed_files import resealed
from tests.support import assert_same, generator


def accelerated(model: nn.Module, kind: GateKind = "learned") -> nn.Module:
    return lraee.accelerate(model, exits=make_exits(model, kind=kind))


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    """The same tensors, and images leave at the same depth with the same bits."""
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same(tensor, states[1][name], name=name)
    images = make_images(9)
    with torch.no_grad(), lraee.trace(found) as first, lraee.trace(expected) as second:
        assert_same(found.encode_image(images), expected.encode_image(images))
    assert_same(first.exit_block, second.exit_block)
    assert_same(first.scores, second.scores)


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_round_trip(tmp_path: Path, kind: GateKind) -> None:
    model = make_model()
    fast = accelerated(model, kind)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same_model(loaded, fast)
    assert (acceleration_of(loaded).exits.classes is None) == (kind in CLASS_FREE)
    lraee.save(loaded, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_half_model(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    exits = make_exits(model, kind="patience")
    lraee.save(lraee.accelerate(model, exits=exits), tmp_path)
    loaded, expected = lraee.load(tmp_path, model), lraee.accelerate(model, exits=exits)
    images = make_images(5).bfloat16()
    with torch.no_grad():
        assert_same(loaded.encode_image(images), expected.encode_image(images))


def test_tower_alone(tmp_path: Path) -> None:
    tower = make_model().visual
    fast = lraee.accelerate(tower, exits=make_exits(tower, kind="patience"))
    lraee.save(fast, tmp_path)
    images = make_images(5)
    with torch.no_grad():
        assert_same(lraee.load(tmp_path, tower)(images), fast(images))


@pytest.mark.parametrize("kind", ["learned", "agreement"])
def test_the_classes_of_now_are_saved(tmp_path: Path, kind: GateKind) -> None:
    model = make_model()
    fast = accelerated(model, kind)
    E = fast.visual.exits.classes.shape[1]
    fast.set_classes(torch.randn(4, E, generator=generator(3)) * 10)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same(loaded.visual.exits.classes, fast.visual.exits.classes)
    assert_same(acceleration_of(loaded).exits.classes, fast.visual.exits.classes)
    assert_same_model(loaded, fast)


def test_restored_and_copied_models(tmp_path: Path) -> None:
    model = make_model()
    fast = accelerated(model)
    lraee.save(copy.deepcopy(fast), tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same_model(copy.deepcopy(loaded), fast)
    restored = lraee.restore(loaded).state_dict()
    for name, tensor in model.state_dict().items():
        assert_same(restored[name], tensor, name=name)


def test_a_save_without_exits_replaces_one_with(tmp_path: Path) -> None:
    model = make_model()
    old, new = lraee.accelerate(model), accelerated(model)
    for fast in (old, new, old):
        lraee.save(fast, tmp_path)
        loaded = lraee.load(tmp_path, model)
        assert (acceleration_of(loaded).exits is None) == (fast is old)
        assert len(list(tmp_path.iterdir())) == 2


def test_exits_that_load_would_refuse_are_not_saved(tmp_path: Path) -> None:
    fast = accelerated(make_model())
    fast.visual.exits.classes[2] = 7.0
    with pytest.raises(ValueError, match=r"^save: exits.classes\[2\] must be rows of length"):
        lraee.save(fast, tmp_path)
    assert not list(tmp_path.iterdir())


def test_head_beyond_the_tower(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(accelerated(model), tmp_path)
    path, (weights,) = tmp_path / FORMAT.config_name, tmp_path.glob("*.safetensors")
    data = weights.read_bytes().replace(b"exits.heads.2.", b"exits.heads.9.")
    config = json.loads(path.read_bytes().replace(b"exits.heads.2.", b"exits.heads.9."))
    config["exits"]["heads"][1]["block"] = 9
    config["exits"]["plans"]["learned"]["blocks"] = [1, 9]
    sha256 = config["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / FORMAT.weights_name(sha256)).write_bytes(data)
    path.write_bytes(resealed(config))
    with pytest.raises(CheckpointError, match="exits must stand before the last of"):
        lraee.load(tmp_path, model)
