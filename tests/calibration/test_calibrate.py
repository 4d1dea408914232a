"""calibrate from images to exits: what it promises on its card, and what it refuses."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lraee
from lraee.calibration.pipeline import SPLITS
from lraee.calibration.plans import Rules
from lraee.exits.bundle import Exits
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.exits.router import Compaction
from tests.small_calibration import (
    QUICK,
    QUICK_PAPER,
    N,
    assert_same_exits,
    calibrated,
    classes_of,
    pictures,
    small_clip,
)
from tests.support import assert_same, generator


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures()


@pytest.fixture(scope="module")
def classes(model: nn.Module, images: Tensor) -> Tensor:
    return classes_of(model, images)


@torch.no_grad()
def known_labels(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The float model's answers, one in five wrong, one in eight unknown."""
    labels = (model.encode_image(images) @ classes.T).argmax(1)
    wrong = torch.rand(len(images), generator=generator(4)) < 0.2
    labels[wrong] = torch.randint(0, len(classes), (int(wrong.sum()),), generator=generator(5))
    labels[::8] = -1
    return labels


def split_of(name: str, usable: Tensor, seed: int = 0) -> Tensor:
    """Indices of one split: a seeded order, cut at 70 and 80 percent."""
    order = usable[torch.randperm(len(usable), generator=generator(seed))]
    n = len(usable)
    cuts = {"heads": (0, round(0.7 * n)), "gate": (round(0.7 * n), round(0.7 * n) + round(0.1 * n))}
    start, stop = cuts.get(name, (cuts["gate"][1], n))
    return order[start:stop]


# From images to a model that runs


def test_first_example(model: nn.Module, images: Tensor, classes: Tensor, tmp_path: Path) -> None:
    """accelerate, calibrate, accelerate with exits, save, load: the same call, the same space."""
    fast = lraee.accelerate(model)
    exits = lraee.calibrate(
        fast, images, classes=classes, recipe=QUICK, is_timed=False, progress=False
    )
    exits.save(tmp_path / "exits")
    with_exits = lraee.accelerate(model, exits=exits)
    lraee.save(with_exits, tmp_path / "model")
    loaded = [
        lraee.load(tmp_path / "model", model),
        lraee.accelerate(model, exits=tmp_path / "exits"),
        lraee.accelerate(model, exits=Exits.load(tmp_path / "exits")),
    ]
    assert_same_exits(Exits.load(tmp_path / "exits"), exits)
    others = pictures(50, seed=9)
    with torch.no_grad(), lraee.trace(with_exits) as t:
        y = with_exits.encode_image(others, normalize=True)
        expected = model.encode_image(others, normalize=True)
        for each in loaded:
            assert_same(each.encode_image(others, normalize=True), y)
        with lraee.full_depth(with_exits):
            assert_same(with_exits.encode_image(others), fast.encode_image(others))
    assert t.flops_saved > 0.05 and len(set(t.exit_block.tolist())) >= 2
    # In the space of the float model: heads of 60 steps already point where it does
    cosine = F.cosine_similarity(y, expected)
    assert cosine.mean() > 0.9 and type(with_exits) is type(model)
    assert exits.chosen == "learned" and exits.card["goal"]["budget"] == 0.8


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "class-free": {"classes": None},
    "labels": {"labels": True, "recipe": QUICK_PAPER},
    "labels, gates only": {"labels": True},
    "paper": {
        "labels": True, "budget": 0.9,
        "recipe": replace(QUICK_PAPER, rules=Rules(3, "paper", is_subset_chosen=False), kappa=0.5),
    },
    "epsilon": {"epsilon": 0.3, "delta": 0.1},
    "epsilon, labels": {"epsilon": 0.3, "delta": 0.1, "labels": True, "recipe": QUICK_PAPER},
    "epsilon, class-free": {"epsilon": 0.4, "delta": 0.1, "classes": None},
    "confidence": {"gate": "confidence"},
    "patience": {"gate": "patience"},
    "agreement": {"gate": "agreement", "budget": 0.9},
    "static": {"gate": "static", "budget": 0.7},
    "views": {
        "recipe": replace(QUICK, head=replace(QUICK.head, kind="mlp", hidden=16, views=1)),
    },
    "patch mean": {"recipe": replace(QUICK, head=replace(QUICK.head, has_class_token=False))},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_card_says_what_happens(
    model: nn.Module, images: Tensor, classes: Tensor, case: str
) -> None:
    """The threshold images, run through the finished model: shares, FLOPs and gain of the card."""
    options = {"classes": classes} | CASES[case]
    if options.pop("labels", False):
        options["labels"] = known_labels(model, images, classes)
    labels: Tensor | None = options.get("labels")
    exits = calibrated(model, images, **options)
    rows = split_of("thresholds", torch.arange(N))
    assert {name: exits.card["images"][name] for name in SPLITS} == {
        "heads": 140, "gate": 20, "thresholds": 40,
    }  # fmt: skip
    if labels is not None:
        rows = rows[labels[rows] >= 0]
    for name in exits.names:
        chosen = replace(exits.using(name), compaction=Compaction(0.0))
        fast, figures = lraee.accelerate(model, exits=chosen), exits.card["plans"][name]
        with torch.no_grad(), lraee.trace(fast) as t:
            y = torch.cat([fast.encode_image(part) for part in images[rows].split(13)])
        assert list(t.stats.share) == pytest.approx(figures["share"])
        assert t.flops_saved == pytest.approx(figures["flops_saved"])
        gain = gain_of(model, y, images, rows, options, is_proof="epsilon" in options)
        assert figures["gain"] == pytest.approx(gain)
        if "epsilon" not in options:
            assert figures["flops_saved"] >= 1 - (options.get("budget") or 0.8) - 1e-9
    if "epsilon" in options:
        assert exits.card["plans"][exits.chosen]["is_certified"], "the case must prove something"


@torch.no_grad()
def gain_of(
    model: nn.Module, y: Tensor, images: Tensor, rows: Tensor, options: dict[str, Any], *,
    is_proof: bool,
) -> float:  # fmt: skip
    """Share of the embeddings y, of these rows of the images, that answer as they should."""
    classes, labels = options["classes"], options.get("labels")
    floats = model.encode_image(images, normalize=True)
    int8 = lraee.accelerate(model).encode_image(images, normalize=True)
    wanted = int8 if is_proof else floats
    y = F.normalize(y, dim=1)
    if classes is None:  # a search among the images that heads learned from
        index = split_of("heads", torch.arange(N))
        searches = [(y, int8[index]), (wanted[rows], wanted[index])]
        result, expected = ((queries @ result.T).argmax(1) for queries, result in searches)
        return float((result == expected).double().mean())
    truth = (wanted[rows] @ classes.T).argmax(1) if labels is None else labels[rows]
    return float(((y @ classes.T).argmax(1) == truth).double().mean())


def test_rivals_come_with_the_plan(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    exits = calibrated(model, images, classes=classes, gate="confidence")
    assert exits.names[0] == exits.chosen == "confidence"
    assert set(exits.names) == set(get_args(GateKind))
    assert set(exits.card["plans"]) == set(exits.plans)
    for name, plan in exits.plans.items():
        assert plan.gate.kind == name
    class_free = calibrated(model, images)
    assert class_free.names == ("agreement", "static") == CLASS_FREE
    assert class_free.classes is None and class_free.card["classes"] == 0
    # A rival that cannot reach the budget is left out; the gate that was asked for is an error
    tight = calibrated(model, images, classes=classes, budget=0.68)
    assert "static" in tight.names and "agreement" not in tight.names
    with pytest.raises(ValueError, match="the agreement gate must reach the budget of 0.68"):
        calibrated(model, images, classes=classes, budget=0.68, gate="agreement")


def test_same_seed_same_bits(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    recipe = replace(QUICK, head=replace(QUICK.head, views=1))
    first, again, other = (
        calibrated(model, images, classes=classes, seed=seed, recipe=recipe) for seed in (1, 1, 2)
    )
    assert_same_exits(again, first)
    assert not torch.equal(other.heads[3].w1, first.heads[3].w1)
    in_batches = calibrated(model, list(images.split(64)), classes=classes, seed=1, recipe=recipe)
    assert_same_exits(in_batches, first)


def test_a_float_model_is_accelerated_first(
    model: nn.Module, images: Tensor, classes: Tensor
) -> None:
    exits = lraee.calibrate(
        model, images, classes=classes, recipe=QUICK, is_timed=False, progress=False
    )
    assert_same_exits(exits, calibrated(model, images, classes=classes))
    with_exits = lraee.accelerate(model, exits=exits)
    again = lraee.calibrate(
        with_exits, images, classes=classes, recipe=QUICK, is_timed=False, progress=False
    )
    assert_same_exits(again, exits)


def test_images_that_are_not_finite_are_left_out(
    model: nn.Module, images: Tensor, classes: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """As if they had not been there, but for the places of the others."""
    broken = images[:160].clone()
    broken[3], broken[77, 0, 0, 0] = torch.nan, torch.inf
    with caplog.at_level(logging.WARNING, logger="lraee"):
        exits = calibrated(model, broken, classes=classes)
    assert "calibrate: 2 of 160 images are not finite" in caplog.text
    assert sum(exits.card["images"].values()) == 158
    kept = torch.tensor([i for i in range(160) if i not in (3, 77)])
    expected = calibrated(model, images[kept], classes=classes)
    for block, head in expected.heads.items():
        assert_same(exits.heads[block].w1, head.w1)
    assert exits.plans == expected.plans
    rows = split_of("thresholds", kept)
    fast = lraee.accelerate(model, exits=replace(exits, compaction=Compaction(0.0)))
    with torch.no_grad(), lraee.trace(fast) as t:
        fast.encode_image(broken[rows])
    assert t.flops_saved == pytest.approx(exits.card["plans"]["learned"]["flops_saved"])


def test_towers_and_half_types(images: Tensor) -> None:
    """A tower alone, in bfloat16; pictures of bfloat16 too."""
    tower = small_clip(seed=5).visual.bfloat16()
    exits = calibrated(tower, images.bfloat16(), budget=0.9)
    assert exits.logit_scale == 100.0 and exits.chosen == "agreement"
    fast = lraee.accelerate(tower, exits=exits)
    with torch.no_grad(), lraee.trace(fast) as t:
        y = fast(images[:40].bfloat16())
    assert y.dtype == torch.bfloat16 and t.flops_saved > 0


@pytest.mark.parametrize("probe_us", [1.5, 2.5])
def test_the_time_of_a_probe_limits_the_exits(
    probe_us: float, model: nn.Module, images: Tensor, classes: Tensor,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The time decides how many exits there are, and when survivors are copied; where one probe is
    beyond what a batch may lose, a warning says so.
    """
    from lraee.calibration import pipeline as calibration
    from lraee.calibration import probe_time

    calls: list[Any] = []

    def measure(fast: nn.Module, block: int, head: Any, classes: Tensor, scale: float) -> Any:
        calls.append((block, scale))
        return probe_time.ProbeTime((100.0, 1000.0), (20.0, 200.0), (probe_us, 3.0), 0.03125)

    monkeypatch.setattr(calibration, "measure", measure)
    exits = calibrated(model, images, classes=classes, is_timed=True)
    assert calls == [(3, pytest.approx(model.logit_scale.exp().item()))]
    assert exits.compaction == Compaction(0.03125)
    assert exits.card["time"]["probe_us"] == (probe_us, 3.0)
    assert ("one probe takes 2.5 % of the tower's time" in caplog.text) == (probe_us > 2)
    # 2 % of the tower's time hold one probe of 1.5 %; agreement has its two all the same
    assert len(exits.plans["learned"].blocks) == len(exits.plans["confidence"].blocks) == 1
    assert len(exits.plans["agreement"].blocks) == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_exits_is_fixed_by_hand(
    count: int, model: nn.Module, images: Tensor, classes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that takes the time of the whole tower limits nothing then."""
    from lraee.calibration import pipeline
    from lraee.calibration.probe_time import ProbeTime

    def measure(*_: Any) -> ProbeTime:
        return ProbeTime((100.0, 1000.0), (20.0, 200.0), (100.0, 3.0), 0.03125)

    monkeypatch.setattr(pipeline, "measure", measure)
    exits = calibrated(model, images, classes=classes, is_timed=True, num_exits=count, budget=0.9)
    assert len(exits.plans["learned"].blocks) == count
    assert len(exits.plans["static"].blocks) == 1
    assert len(exits.plans["agreement"].blocks) <= max(2, count)
    assert exits.card["recipe"]["rules"]["num_exits"] == count
    assert exits.card["time"]["probe_us"] == (100.0, 3.0)


# A folder to go on from


class Interrupted(Exception):
    pass


class CountedImages:
    """Batches, counted; the pass number `stop` breaks off in its second batch."""

    def __init__(self, images: Tensor, stop: int | None = None) -> None:
        self.images, self.stop, self.passes = images, stop, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for i, part in enumerate(self.images.split(64)):
            if self.passes == self.stop and i == 1:
                raise Interrupted
            yield part


def test_an_interrupted_run_resumes_and_gives_the_same_exits(
    model: nn.Module, images: Tensor, classes: Tensor, tmp_path: Path
) -> None:
    """Interrupted in turn in noise, view 1 and probes, it repeats no stage that it kept.

    Passes of a whole run: a look at the first batch, embeddings, noise, view 0, view 1, probes.
    """
    recipe = replace(QUICK, head=replace(QUICK.head, views=1))
    options: dict[str, Any] = {"classes": classes, "recipe": recipe}
    whole = CountedImages(images)
    expected = calibrated(model, whole, **options)
    assert whole.passes == 6
    folder = tmp_path / "run"
    heads = {"head 3", "head 4", "head 5"}
    stages = (
        (3, {"embeddings"}),  # broken off in noise
        (4, {"embeddings", "view 0"}),  # a look, noise and view 0 came before
        (4, {"embeddings", "view 0", "view 1", *heads}),  # a look, noise and view 1
    )
    for stop, done in stages:
        with pytest.raises(Interrupted):
            calibrated(model, CountedImages(images, stop=stop), folder=folder, **options)
        assert {path.stem for path in folder.glob("*.safetensors")} == done
    last = CountedImages(images)
    exits = calibrated(model, last, folder=folder, **options)
    assert last.passes == 3  # a look, noise and probes
    assert_same_exits(exits, expected)
    assert not folder.exists()


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"recipe": QUICK_PAPER}, {"classes": None}, {"images": 150}]
)
def test_other_settings_start_anew(
    model: nn.Module, images: Tensor, classes: Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    options: dict[str, Any] = {
        "classes": classes, "labels": None, "folder": tmp_path / "run", "recipe": QUICK,
    }  # fmt: skip
    with pytest.raises(Interrupted):
        calibrated(model, CountedImages(images, stop=3), **options)
    options |= changes
    fewer = images[: options.pop("images", N)]
    if changes.get("recipe"):
        options["labels"] = known_labels(model, fewer, classes)
    fresh = {**options, "folder": None}
    assert_same_exits(calibrated(model, fewer, **options), calibrated(model, fewer, **fresh))


def test_other_goals_go_on_from_the_same_heads(
    model: nn.Module, images: Tensor, classes: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        calibrated(model, CountedImages(images, stop=5), classes=classes, folder=folder)
    counted = CountedImages(images)
    exits = calibrated(model, counted, classes=classes, folder=folder, epsilon=0.3, gate="static")
    assert counted.passes == 3
    assert_same_exits(exits, calibrated(model, images, classes=classes, epsilon=0.3, gate="static"))


def test_a_folder_of_photos_is_not_emptied(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a photo")
    with pytest.raises(ValueError, match="calibrate: folder must be new, empty"):
        calibrated(model, images, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]
