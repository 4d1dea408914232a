"""Exits come back bit for bit; a file that is not one of ours is refused in one line."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import lraee
from lraee.exits.bundle import Exits
from lraee.exits.gate import GateKind
from lraee.exits.router import Compaction
from lraee.layers.scheme import PAPER, Scheme
from lraee.towers.state import tower_hash
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.exits.small_exits import D, E, nested, small_exits
from tests.support import assert_same


def assert_same_exits(found: Exits, expected: Exits) -> None:
    """Equal in every field, each tensor bit for bit."""
    for name in set(vars(expected)) - {"heads", "classes"}:
        assert getattr(found, name) == getattr(expected, name), name
    for name, plan in expected.plans.items():  # -0.0 == 0.0 and 1 == 1.0, but not in repr
        assert repr(found.plans[name]) == repr(plan)
    assert sorted(found.heads) == sorted(expected.heads)
    for block, head in expected.heads.items():
        assert_same_bits(found.heads[block].tensors(), head.tensors())
    assert (found.classes is None) == (expected.classes is None)
    if expected.classes is not None:
        assert_same_bits({"classes": found.classes}, {"classes": expected.classes})


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_same(found[name].view(torch.int32), tensor.view(torch.int32), name=name)


# Round trip


@pytest.mark.parametrize("classes", [None, 1, 5])
@pytest.mark.parametrize("kind", get_args(GateKind))
def test_round_trip(tmp_path: Path, kind: GateKind, classes: int | None) -> None:
    exits = small_exits(kind, classes=classes)
    exits.save(tmp_path / "new" / "folder")
    loaded = Exits.load(str(tmp_path / "new" / "folder"))
    assert_same_exits(loaded, exits)
    assert list(loaded.heads) == [2, 5, 11]
    assert loaded.plan.gate.thresholds == exits.plan.gate.thresholds
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "folder" / path.name).read_bytes()


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_a_tower_with_loaded_exits_gives_the_same_bits(tmp_path: Path, kind: GateKind) -> None:
    model = make_model()
    exits = make_exits(model, kind=kind, blocks=(1,) if kind == "static" else (1, 2))
    exits.save(tmp_path)
    fast, again = (lraee.accelerate(model, exits=source) for source in (exits, tmp_path))
    states = fast.state_dict(), again.state_dict()
    assert list(states[0]) == list(states[1]) and any("exits" in name for name in states[0])
    for name, tensor in states[0].items():
        assert_same(states[1][name], tensor, name=name)
    images = make_images(5)
    with torch.no_grad():
        assert_same(again.encode_image(images), fast.encode_image(images))
    assert tower_hash(model.visual.state_dict()) == Exits.load(tmp_path).base_hash


def test_tensors_may_share_memory_and_be_views(tmp_path: Path) -> None:
    exits = small_exits()
    head = exits.heads[2]
    shared = torch.ones(1).expand(D)
    turned = torch.randn(D, E).t()
    viewed = replace(head, gamma=shared, beta=shared, w1=turned)
    replace(exits, heads={**exits.heads, 2: viewed}).save(tmp_path)
    result = Exits.load(tmp_path).heads[2]
    assert_same(result.w1, turned)
    assert_same(result.gamma, torch.ones(D))
    assert result.gamma.data_ptr() != result.beta.data_ptr()


# Saving refuses what loading would: the same validator, so here what files cannot hold


def headed(**changed: Any) -> Callable[[Exits], Exits]:
    """Another head at block 5."""
    return lambda e: replace(e, heads={**e.heads, 5: replace(e.heads[5], **changed)})


def changed(**fields: Any) -> Callable[[Exits], Exits]:
    return lambda e: replace(e, **fields)


UNSAVABLE: list[tuple[Callable[[Exits], Exits], str]] = [
    (headed(gamma=torch.ones(D).half()), r"heads.5.gamma \['F32', \[8\]\], got \['torch.float16'"),
    (headed(beta=torch.ones(D + 1)), r"heads.5.beta \['F32', \[8\]\], got \['F32', \[9\]\]"),
    (headed(b1=torch.full((3,), math.nan)), r"heads.5.b1\[0\] must be finite, got nan"),
    (headed(b2=None), r"heads.5.b2 \['F32', \[6\]\], got None"),
    (headed(w2=torch.ones(E + 1, 3)), "heads.5.w2 "),
    (lambda e: replace(e, heads={True: e.heads[5], **e.heads}), "from 1 to 512, got True"),
    (lambda e: replace(e, plans={**e.plans, "a\nb": e.plan}), "printable ASCII"),
    (changed(classes=torch.ones(2, E)), "rows of length 1"),
    (changed(classes=torch.ones(0, E)), "classes must be an integer"),
    (changed(classes=torch.ones(E)), r"classes \['F32', \[6, 6\]\], got"),
    (changed(classes=torch.eye(E).double()), "got .'torch.float64'"),
    (changed(logit_scale=0.0), "number above 0, got 0.0"),
    (changed(compaction=Compaction(math.nan)), "must be JSON, got .*nan"),
    (changed(scheme=replace(PAPER, clip_weights=1)), "scheme.clip_weights must be true or false"),
    (changed(scheme=Scheme(keep_float=("y" * (5 << 20),))), "exits.json must be of at most"),
    (changed(card={"x": torch.ones(1)}), "must be JSON"),
    (changed(card={"x": [math.nan]}), "must be JSON, got .*nan"),
    (changed(card={"x": nested(32)}), "at most 32 levels"),
    (changed(card={"x": nested(100_000)}), "must be JSON"),
    (changed(card={1: 1, "1": 1}), "must be JSON"),
]  # fmt: skip


def test_save_refuses_what_load_would(tmp_path: Path) -> None:
    for change, match in UNSAVABLE:
        with pytest.raises(ValueError, match=f"^save: .*{match}") as caught:
            change(small_exits()).save(tmp_path)
        line = str(caught.value)
        assert "\n" not in line and len(line) < 600, line
        assert not list(tmp_path.iterdir())


def test_card_of_32_levels_is_saved(tmp_path: Path) -> None:
    exits = replace(small_exits(), card={"x": nested(31)})
    exits.save(tmp_path)
    assert Exits.load(tmp_path).card == exits.card


def test_exits_and_a_checkpoint_share_a_folder(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 1})
    fast, exits = lraee.accelerate(model), small_exits()
    exits.save(tmp_path)
    lraee.save(fast, tmp_path)
    exits.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert_same_exits(Exits.load(tmp_path), exits)
    lraee.load(tmp_path, model)
