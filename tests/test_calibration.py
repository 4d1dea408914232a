"""The steps of a calibration: who is right, which candidates, which splits, what it costs."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lraee
from lraee.accelerate import Acceleration, acceleration_of
from lraee.calibration import (
    BEST,
    MIN_IMAGES,
    PAPER,
    SPLITS,
    Calibration,
    Task,
    digest,
)
from lraee.collect import Images, Pair
from lraee.exits.answers import Index, judge
from lraee.exits.noise import pathological
from lraee.exits.plans import Goal, Rules
from lraee.exits.router import Router
from lraee.flops import PartFlops, probe_flops
from lraee.stages import Stages
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


# Who is right


CLASSES = torch.eye(3)
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [3.0, 0.0, 1.0]])
FULL = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
"""The float model answers 0, 1, 2, 0; int8 at full depth 0, 1, 1, 0."""
TOP1 = torch.tensor([[0, 0], [2, 1], [2, 1], [1, 1]])


def probes_of(top1: Tensor, embedding: Tensor | None = None) -> dict[str, Tensor]:
    n, m = top1.shape
    embedding = torch.zeros(n, m, 3) if embedding is None else embedding
    return {"top1": top1, "embedding": embedding, "features": torch.zeros(n, m, 3)}


def test_right_is_what_the_float_model_says() -> None:
    found = judge(probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=None)
    assert found.is_understood.int().tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert found.gain.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]
    # The loss is against int8 at full depth, which is wrong of image 2
    assert found.loss.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert not found.is_signed


def test_a_proof_is_of_the_answer_at_full_depth() -> None:
    found = judge(
        probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=None,
        is_proof=True,
    )  # fmt: skip
    assert found.is_understood.int().tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert found.gain.tolist() == (1 - found.loss).tolist()


@pytest.mark.parametrize("is_proof", [False, True])
def test_right_is_the_label_where_there_are_labels(is_proof: bool) -> None:
    labels = torch.tensor([0, 2, 1, 1])
    found = judge(
        probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=labels,
        is_proof=is_proof,
    )  # fmt: skip
    assert found.is_understood.int().tolist() == [[1, 1], [1, 0], [0, 1], [1, 1]]
    assert found.gain.tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
    # (right at full depth - right here + 1) / 2
    assert found.loss.tolist() == [
        [0.5, 0.5, 0.5], [0.0, 0.5, 0.5], [1.0, 0.5, 0.5], [0.0, 0.0, 0.5],
    ]  # fmt: skip
    assert found.is_signed


def naive_search(query: Tensor, rows: Tensor, itself: int) -> int:
    cosines = [float(F.cosine_similarity(query.double(), row, dim=0)) for row in rows.double()]
    return max((i for i in range(len(rows)) if i != itself), key=lambda i: cosines[i])


@pytest.mark.parametrize("has_index", [False, True])
def test_without_classes_right_is_what_float_finds(has_index: bool) -> None:
    """A search for the nearest other image: in int8 embeddings, against float in float ones."""
    n, m, N, E = 17, 2, 40, 5
    floats = torch.randn(N, E, generator=generator(0))
    int8 = floats + 0.2 * torch.randn(N, E, generator=generator(1))
    places = torch.randperm(N, generator=generator(2))[:n]
    embeddings = {"teacher": floats[places], "full": int8[places]}
    index = Index({"teacher": floats, "full": int8}, places)
    if not has_index:  # these images are all there is
        floats, int8, places = floats[places], int8[places], torch.arange(n)
    noise = torch.randn(n, m, E, generator=generator(3)) * torch.tensor([[1.0], [0.4]])
    embedding = 9 * (floats[places][:, None] + noise)
    probes = probes_of(torch.zeros(n, m, dtype=torch.int64), embedding)
    options: dict[str, Any] = {"classes": None, "labels": None}
    options["index"] = index if has_index else None
    found = judge(probes, embeddings, **options)
    proof = judge(probes, embeddings, **options, is_proof=True)
    for i, place in enumerate(places.tolist()):
        answers = [naive_search(each, int8, place) for each in (*embedding[i], int8[place])]
        truth = naive_search(floats[place], floats, place)
        right, same = [a == truth for a in answers], [a == answers[-1] for a in answers]
        assert found.is_understood[i].tolist() == right[:-1]
        assert found.gain[i].tolist() == right and found.loss[i].tolist() == [not s for s in same]
        assert proof.gain[i].tolist() == same and proof.loss[i].tolist() == found.loss[i].tolist()
    means = found.gain.mean(0)
    assert 0 < means[0] < means[1] < 1 and 0 < means[2] < 1


def test_the_same_image_twice_loses_nothing() -> None:
    """Else full depth would lose against itself wherever a photo is there twice."""
    once = torch.randn(6, 5, generator=generator(4))
    teacher = torch.cat([once, once[:3]])
    probes = probes_of(torch.zeros(9, 1, dtype=torch.int64), teacher[:, None])
    found = judge(probes, {"teacher": teacher, "full": teacher}, classes=None, labels=None)
    assert found.loss.sum() == 0.0 and found.gain.mean() == 1.0 and found.is_understood.all()


# Candidates, splits, cost


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
    parts = PartFlops.of(model.visual)
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
