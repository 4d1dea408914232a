"""The steps of a calibration: which candidates, which splits, what heads see, what it costs."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration import pipeline as calibration_module
from lraee.calibration.collect import Images, Pair
from lraee.calibration.noise import pathological
from lraee.calibration.pipeline import (
    BEST,
    MIN_IMAGES,
    PAPER,
    SPLITS,
    Calibration,
    Task,
    digest,
)
from lraee.calibration.plans import Goal, Rules
from lraee.exits.head import HeadWeights
from lraee.exits.router import Router
from lraee.model.acceleration import Acceleration, acceleration_of
from lraee.storage.stages import Stages
from lraee.towers.flops import PartFlops, probe_flops
from tests.exits.made_exits import make_head
from tests.small_calibration import LAYERS, QUICK, classes_of, pictures, small_clip
from tests.support import assert_same, generator

N = 120


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(N)


def calibration(model: nn.Module, images: Images, **changes: Any) -> Calibration:
    fast = lraee.accelerate(model)
    task = Task(QUICK, Goal(0.8), "agreement", None, None, 20.0, seed=0, is_timed=False)
    pair = Pair(model, fast, images, batch=64, progress=False)
    made = cast(Acceleration, acceleration_of(fast))
    return Calibration(pair, made, replace(task, **changes), Stages(None, None))


def test_splits_are_disjoint_and_complete(model: nn.Module, images: Tensor) -> None:
    broken = images.clone()
    broken[[5, 60]] = torch.nan
    splits = calibration(model, broken, seed=3).splits
    assert list(splits) == list(SPLITS) == ["heads", "gate", "thresholds"]
    counts = torch.stack(list(splits.values())).sum(0)
    assert counts[[5, 60]].tolist() == [0, 0] and int(counts.sum()) == 118 == int(
        (counts > 0).sum()
    )
    assert [int(mask.sum()) for mask in splits.values()] == [83, 12, 23]  # 70 and 10 % of 118
    again, other = (calibration(model, broken, seed=seed).splits for seed in (3, 4))
    assert_same(again["heads"], splits["heads"])
    assert not torch.equal(other["heads"], splits["heads"])


def test_as_many_images_as_it_takes(model: nn.Module, images: Tensor) -> None:
    assert sum(int(m.sum()) for m in calibration(model, images[:100]).splits.values()) == 100
    broken = images[:MIN_IMAGES].clone()
    broken[0] = torch.nan
    with pytest.raises(ValueError, match="^calibrate: images must be at least 100, got 99"):
        calibration(model, broken).splits  # noqa: B018


def test_candidates_stand_behind_the_first_blocks(model: nn.Module, images: Tensor) -> None:
    default = calibration(model, images, recipe=replace(QUICK, candidates=None)).candidates
    assert default == list(range(LAYERS // 3, LAYERS))
    some = calibration(model, images, recipe=replace(QUICK, candidates=(4, 2, 4)))
    assert some.candidates == [2, 4]


def test_noise_drops_candidates(model: nn.Module, images: Tensor) -> None:
    made = calibration(model, images, recipe=replace(QUICK, kappa=0.999))
    inr = {depth: made.noise[depth - 1].inr for depth in (3, 4, 5)}
    dropped = pathological(inr, 0.999)
    assert dropped and made.dropped == dropped
    assert made.candidates == [depth for depth in (3, 4, 5) if depth not in dropped]
    assert list(made.heads) == made.candidates


@pytest.mark.parametrize("has_classes", [False, True])
def test_costs_are_those_of_a_router(model: nn.Module, images: Tensor, has_classes: bool) -> None:
    classes = classes_of(model, images) if has_classes else None
    recipe = replace(QUICK, head=replace(QUICK.head, steps=1))
    made = calibration(model, images, classes=classes, recipe=recipe)
    exits = made.run()
    plan = replace(exits.plan, blocks=(3, 5), gate=replace(
        exits.plan.gate, kind="confidence", weights=((0.0,) * 4,) * 2, thresholds=(0.5, 0.5)
    ))  # fmt: skip
    router = replace(
        exits, plans={"x": plan}, chosen="x",
        classes=torch.eye(1, 24) if classes is None else classes,
    ).router()  # fmt: skip
    assert isinstance(router, Router)
    parts = PartFlops.as_run(lraee.accelerate(model).visual)
    assert parts.total < PartFlops.of(model.visual).total  # the last block is the class token's
    expected = parts.when_leaving((3, 5), probe_flops(router))
    assert made.costs.when_leaving((0, 2)) == expected
    assert made.costs.full == parts.total


def test_views_are_drawn_by_seed_and_number(model: nn.Module, images: Tensor) -> None:
    recipe = replace(QUICK, head=replace(QUICK.head, views=2))
    made = calibration(model, images, recipe=recipe, seed=7)
    views, rows = made._views(), made.splits["heads"]
    pair = Pair(model, lraee.accelerate(model), images, batch=64, progress=False)
    for view, seed in zip(views, (None, 7001, 7002), strict=True):
        expected = pair.pooled([3, 4, 5], rows, view_seed=seed)
        for name, tensor in expected.items():
            assert_same(view[name], tensor, seed=seed)


def test_heads_see_the_label_of_each_view(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def train_head(pooled: Tensor, teacher: Tensor, **options: Any) -> HeadWeights:
        seen.append({"pooled": pooled, "teacher": teacher, **options})
        return make_head(32, 24, hidden=None, has_class_token=False, seed=0)

    monkeypatch.setattr(calibration_module, "train_head", train_head)
    labels = torch.arange(N) % 5
    head = replace(QUICK.head, views=2, has_class_token=False)
    made = calibration(
        model, images, recipe=replace(QUICK, head=head), labels=labels, classes=torch.eye(5, 24)
    )
    assert len(made.heads) == 3
    views, own = made._views(), labels[made.splits["heads"]].tolist()
    for place, call in enumerate(seen):
        assert call["labels"].tolist() == own * 3 and call["seed"] == 0
        assert_same(call["teacher"], torch.cat([view["teacher"] for view in views]))
        # The patch mean alone: the first half of what was pooled
        pooled = [view["pooled"][:, place, :32] for view in views]
        assert_same(call["pooled"], torch.cat(pooled))


def test_digest() -> None:
    assert digest(None) == "" and digest(torch.tensor([1.0])) != digest(torch.tensor([2.0]))
    x = torch.randn(6, 4, generator=generator(5))
    for each in (x, x.bfloat16(), x.half(), x.long(), x[:0]):
        assert len(digest(each)) == 64
    assert digest(x.T) == digest(x.T.contiguous()) != digest(x)
    # sha256 of the bytes of 1.0 in float32
    assert digest(torch.tensor([[1.0]])).startswith("e00e5eb9")


def test_recipes() -> None:
    """The published recipe as published; ours needs no labels."""
    assert PAPER.candidates == (8, 9, 10, 11) and PAPER.kappa == 0.5
    assert PAPER.rules == Rules(4, "paper", is_subset_chosen=False)
    assert PAPER.head.training == "both" and PAPER.head.epochs == 3
    assert BEST.head.training == "distill" and BEST.rules.is_subset_chosen
