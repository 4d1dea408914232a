"""A checkpoint holds the early exits of its model: they come back, or the file is refused."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.model.accelerate import acceleration_of
from lraee.model.checkpoint import FORMAT
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.sealed_files import (
    Edit,
    Files,
    Rewrite,
    adapted,
    cuts,
    expect_refusal,
    filled,
    put,
    read_files,
    resealed,
    retyped,
    rewritten,
    weights_name,
)
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
    assert read_files(tmp_path / "again", FORMAT) == read_files(tmp_path, FORMAT)


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


def test_a_save_with_exits_replaces_one_without_or_leaves_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    old, new = lraee.accelerate(model), accelerated(model)
    lraee.save(old, tmp_path)
    outcomes = []
    for _ in cuts(monkeypatch, partial(lraee.save, new, tmp_path)):
        loaded = lraee.load(tmp_path, model)
        outcomes.append(acceleration_of(loaded).exits is None)
        lraee.save(old, tmp_path)
    assert outcomes[:4] == [True] * 4 and False in outcomes, outcomes
    assert_same_model(lraee.load(tmp_path, model), new)
    lraee.save(old, tmp_path)
    assert acceleration_of(lraee.load(tmp_path, model)).exits is None
    assert len(list(tmp_path.iterdir())) == 2


def test_exits_that_load_would_refuse_are_not_saved(tmp_path: Path) -> None:
    fast = accelerated(make_model())
    fast.visual.exits.classes[2] = 7.0
    with pytest.raises(ValueError, match=r"^save: exits: classes\[2\] must have length 1, got"):
        lraee.save(fast, tmp_path)
    assert not list(tmp_path.iterdir())


# Hostile files, each with all hashes right


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Files]:
    torch.manual_seed(0)
    model = make_model()
    folder = tmp_path_factory.mktemp("saved")
    lraee.save(accelerated(model), folder)
    return model, read_files(folder, FORMAT)


def exits(**changed: Any) -> Edit:
    return lambda c: c["exits"].update(changed)


CONFIG_CASES: dict[str, tuple[Edit, str]] = {
    "exits null": (lambda c: c.update(exits=None), "tensors must be those of the model"),
    "exits a list": (lambda c: c.update(exits=[]), "exits must be an object"),
    "exits a path": (lambda c: c.update(exits="/etc/passwd"), "exits must be an object"),
    "exits empty": (lambda c: c.update(exits={}), "exits must have the key"),
    "exits have more": (exits(x=1), "exits must have no key but its own"),
    "heads fewer": (lambda c: c["exits"]["heads"].pop(), "tensors must be those of the model"),
    "classes more": (exits(classes=100), "tensors must be those of the model"),
    "classes null": (exits(classes=None), "tensors must be those of the model"),
    "of another tower": (exits(base_hash="0" * 64), "exits.base_hash must be base_sha256"),
    "of another scheme": (
        lambda c: c["exits"]["scheme"].update(clip_weights=True),
        "exits.scheme must be scheme",
    ),
    "chosen unknown": (exits(chosen="x"), "chosen must be one of"),
    "logit scale 0": (exits(logit_scale=0.0), "logit_scale must be above 0"),
    "card null": (exits(card=None), "card must be an object"),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_hostile_exits(saved: tuple[nn.Module, Files], tmp_path: Path, case: str) -> None:
    model, files = saved
    edit, match = CONFIG_CASES[case]
    config = json.loads(files.config)
    edit(config)
    put(tmp_path, FORMAT, resealed(config), files.weights, weights_name(FORMAT, files.config))
    expect_refusal(partial(lraee.load, tmp_path, model), match)


WEIGHTS_CASES: dict[str, tuple[Rewrite, str]] = {
    "head NaN": (retyped("exits.heads.1.w1", filled(float("nan"))), "heads.1.w1 must be finite"),
    "head of doubles": (retyped("exits.heads.1.w1", Tensor.double), "must be F32"),
    "class not unit": (retyped("exits.classes", filled(1.0)), r"classes\[1\] must have length 1"),
    "head another": (retyped("exits.heads.1.b1", filled(0.5)), "state_sha256 must be that of the"),
    "class another": (retyped("exits.classes", lambda t: t.flip(0)), "state_sha256 must be that"),
}


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_hostile_tensors(saved: tuple[nn.Module, Files], tmp_path: Path, case: str) -> None:
    model, files = saved
    rewrite, match = WEIGHTS_CASES[case]
    put(tmp_path, FORMAT, *rewritten(files, rewrite))
    expect_refusal(partial(lraee.load, tmp_path, model), match)


def test_head_beyond_the_tower(saved: tuple[nn.Module, Files], tmp_path: Path) -> None:
    model, files = saved
    moved = Files(*(data.replace(b"exits.heads.2.", b"exits.heads.9.") for data in files))
    config = adapted(*moved)
    config["exits"]["heads"][1]["block"] = 9
    config["exits"]["plans"]["learned"]["blocks"] = [1, 9]
    put(tmp_path, FORMAT, resealed(config), moved.weights)
    expect_refusal(partial(lraee.load, tmp_path, model), "exits must stand before the last of")
