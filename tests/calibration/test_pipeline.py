"""The steps of a calibration, each by itself: splits, candidates, views, heads, costs, limits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration import pipeline
from lraee.calibration.collect import MIN_IMAGES, Images, Pair, split_images
from lraee.calibration.noise import BlockNoise, pathological
from lraee.calibration.pipeline import (
    BEST,
    PAPER,
    SPLITS,
    Features,
    Task,
    choose_candidates,
    collect_features,
    collect_views,
    digest,
    limit_exits,
    train_heads,
)
from lraee.calibration.plans import Goal, Rules
from lraee.calibration.probe_time import ProbeTime
from lraee.calibration.scoring import probe_costs
from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights
from lraee.exits.router import Router
from lraee.storage import spill
from lraee.storage.stages import Stages
from lraee.towers.flops import PartFlops, probe_flops
from tests.exits.random_exits import make_head
from tests.small_calibration import (
    LAYERS,
    QUICK,
    assert_same_exits,
    calibrated,
    classes_of,
    pictures,
    small_clip,
)
from tests.storage.test_spill import is_on_disk
from tests.support import assert_same, generator

N = 120


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(N)


def task_of(**changes: Any) -> Task:
    task = Task(QUICK, Goal(0.8), "agreement", None, None, 20.0, seed=0, is_timed=False)
    return replace(task, **changes)


def features_of(model: nn.Module, images: Images, **changes: Any) -> Features:
    pair = Pair(model, lraee.accelerate(model), images, batch=64, progress=False)
    keep = Stages(None, None).get
    return collect_features(pair, task_of(**changes), keep=keep, keep_head=keep)


def noise_of(inr: list[float]) -> list[BlockNoise]:
    return [BlockNoise(1.0, 0.1, 0.1, 0.0, 1.0, 1.0, inr=each) for each in inr]


def test_splits_are_disjoint_and_complete() -> None:
    embeddings = {
        name: torch.randn(N, 4, generator=generator(i))
        for i, name in enumerate(("teacher", "full"))
    }
    embeddings["teacher"][5] = torch.nan
    embeddings["full"][60, 2] = torch.inf
    splits = split_images(embeddings, shares=SPLITS, seed=3)
    assert list(splits) == list(SPLITS) == ["heads", "gate", "thresholds"]
    counts = torch.stack(list(splits.values())).sum(0)
    assert counts[[5, 60]].tolist() == [0, 0] and int(counts.sum()) == 118 == int(
        (counts > 0).sum()
    )
    assert [int(mask.sum()) for mask in splits.values()] == [83, 12, 23]  # 70 and 10 % of 118
    again, other = (split_images(embeddings, shares=SPLITS, seed=seed) for seed in (3, 4))
    assert_same(again["heads"], splits["heads"])
    assert not torch.equal(other["heads"], splits["heads"])


def test_as_many_images_as_it_takes() -> None:
    embeddings = {name: torch.ones(MIN_IMAGES, 4) for name in ("teacher", "full")}
    splits = split_images(embeddings, shares=SPLITS, seed=0)
    assert sum(int(mask.sum()) for mask in splits.values()) == MIN_IMAGES
    embeddings["full"][0] = torch.nan
    with pytest.raises(ValueError, match="^calibrate: images must be at least 100, got 99"):
        split_images(embeddings, shares=SPLITS, seed=0)


def test_candidates_stand_behind_the_first_blocks() -> None:
    noise = noise_of([1.0] * LAYERS)
    default = choose_candidates(replace(QUICK, candidates=None), noise)
    assert default == (list(range(LAYERS // 3, LAYERS)), [])
    assert choose_candidates(replace(QUICK, candidates=(4, 2, 4)), noise) == ([2, 4], [])
    for wrong in (0, LAYERS):
        with pytest.raises(ValueError, match=f"candidates must be 1 to {LAYERS - 1}, got {wrong}"):
            choose_candidates(replace(QUICK, candidates=(3, wrong)), noise)
    with pytest.raises(ValueError, match="candidates must be one at least, got none: the tower"):
        choose_candidates(replace(QUICK, candidates=None), noise_of([1.0]))


def test_noise_drops_candidates() -> None:
    noise = noise_of([9.0, 9.0, 1.0, 3.0, 5.0, 9.0])  # of the candidates 3, 4, 5 the mean is 3
    assert choose_candidates(replace(QUICK, kappa=0.5), noise) == ([4, 5], [3])
    assert choose_candidates(replace(QUICK, kappa=1.0), noise) == ([4, 5], [3])
    assert choose_candidates(replace(QUICK, kappa=1.5), noise) == ([5], [3, 4])


def test_features_have_a_head_per_candidate(model: nn.Module, images: Tensor) -> None:
    features = features_of(model, images, recipe=replace(QUICK, kappa=0.999))
    inr = {depth: features.noise[depth - 1].inr for depth in (3, 4, 5)}
    assert features.dropped and features.dropped == pathological(inr, 0.999)
    assert features.candidates == [d for d in (3, 4, 5) if d not in features.dropped]
    assert list(features.heads) == features.candidates
    held_out = features.splits["gate"] | features.splits["thresholds"]
    assert len(features.probes["top1"]) == int(held_out.sum())
    for split in ("gate", "thresholds"):
        table = features.table(split, is_proof=False)
        assert len(table.top1) == int(features.splits[split].sum())


@pytest.mark.parametrize("has_classes", [False, True])
def test_costs_are_those_of_a_router(model: nn.Module, images: Tensor, has_classes: bool) -> None:
    classes = classes_of(model, images) if has_classes else torch.eye(1, 24)
    heads = {
        block: make_head(32, 24, hidden=8 * block, has_class_token=True, seed=block)
        for block in (3, 4, 5)
    }
    gate = Gate("confidence", ((0.0,) * 4,) * 2, (0.5, 0.5))
    router = Router((3, 5), [heads[3], heads[5]], gate, classes=classes, logit_scale=20.0)
    parts = PartFlops.as_run(lraee.accelerate(model).visual)
    assert parts.total < PartFlops.of(model.visual).total  # the last block is the class token's
    costs = probe_costs(heads, classes, parts)
    assert costs.when_leaving((0, 2)) == parts.when_leaving((3, 5), probe_flops(router))
    assert costs.full == parts.total


def test_views_are_drawn_by_seed_and_number(model: nn.Module, images: Tensor) -> None:
    pair = Pair(model, lraee.accelerate(model), images, batch=64, progress=False)
    rows = torch.arange(N) % 3 > 0
    names: list[str] = []

    def keep(name: str, make: Any) -> dict[str, Tensor]:
        names.append(name)
        return dict(make())

    views = collect_views(pair, [3, 5], rows, views=2, seed=7, keep=keep)
    assert names == ["view 0", "view 1", "view 2"]
    for view, seed in zip(views, (None, 7001, 7002), strict=True):
        expected = pair.pooled([3, 5], rows, view_seed=seed)
        for name, tensor in expected.items():
            assert_same(view[name], tensor, seed=seed)


def test_heads_train_on_the_label_of_each_view(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def train_head(pooled: Tensor, teacher: Tensor, **options: Any) -> HeadWeights:
        calls.append({"pooled": pooled, "teacher": teacher, **options})
        return make_head(32, 24, hidden=None, has_class_token=False, seed=0)

    monkeypatch.setattr(pipeline, "train_head", train_head)
    source, labels = generator(0), torch.arange(9) % 5
    views = [
        {
            "pooled": torch.randn(9, 3, 64, generator=source),
            "teacher": torch.randn(9, 24, generator=source),
        }
        for _ in range(3)
    ]
    head = replace(QUICK.head, has_class_token=False)
    task = task_of(recipe=replace(QUICK, head=head), classes=torch.eye(5, 24), seed=6)
    keep = Stages(None, None).get
    heads = train_heads(views, [3, 4, 5], task, labels=labels, keep=keep, progress=False)
    assert list(heads) == [3, 4, 5]
    for place, call in enumerate(calls):
        assert call["labels"].tolist() == labels.tolist() * 3 and call["seed"] == 6
        assert_same(call["teacher"], torch.cat([view["teacher"] for view in views]))
        # The patch mean alone: the first half of what was pooled
        pooled = [view["pooled"][:, place, :32] for view in views]
        assert_same(call["pooled"], torch.cat(pooled))


def test_time_limits_the_exits_unless_their_number_is_fixed() -> None:
    time = ProbeTime((1000.0, 1000.0), (1.0, 1.0), (9.0, 1.0), 0.1)  # two probes in 2 %
    assert limit_exits(Rules(3), time) == Rules(2)
    assert limit_exits(Rules(1), time) == Rules(1)
    assert limit_exits(Rules(3), None) == Rules(3)
    assert limit_exits(Rules(3, num_exits=4), time) == Rules(3, num_exits=4)
    assert limit_exits(PAPER.rules, time) == PAPER.rules


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


def test_features_on_disk_have_the_bits_of_those_in_memory(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(N) % 3 > 0
    results = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(spill, "IN_MEMORY_BYTES", limit)
        pair = Pair(model, lraee.accelerate(model), images, batch=64, progress=False)
        views = pair.pooled([3, 5], rows, view_seed=2)
        assert is_on_disk(views["pooled"]) == is_on_disk(views["teacher"]) == (limit == 0)
        results.append((views, calibrated(model, images)))
    (views, exits), (views_on_disk, exits_on_disk) = results
    for name, tensor in views.items():
        assert_same(views_on_disk[name], tensor, name=name)
    assert_same_exits(exits_on_disk, exits)
