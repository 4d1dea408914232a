"""One calibration in explicit steps: split, collect features, train heads, probe time, plans, card.

Each step is a function of plain inputs; Calibration.run puts them in order.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from lraee.calibration.collect import FeatureSource, split_images
from lraee.calibration.head_training import BEST_HEAD, PAPER_HEAD, HeadOptions, train_head
from lraee.calibration.noise import BlockNoise, as_rows, pathological
from lraee.calibration.plans import Goal, Rules, make_plan
from lraee.calibration.probe_time import BATCHES, OVERHEAD, ProbeTime, measure
from lraee.calibration.scoring import Costs, ExitTable, probe_costs
from lraee.calibration.targets import Index, judge
from lraee.exits.bundle import Exits, one_class
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.exits.head import HeadWeights
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.measurement import machine
from lraee.model.acceleration import Acceleration
from lraee.storage.stages import Tensors
from lraee.towers.families import find_tower
from lraee.towers.flops import PartFlops

_log = logging.getLogger("lraee")

SPLITS = {"heads": 0.7, "gate": 0.1, "thresholds": 0.2}
"""Shares of the images, drawn by the seed; no image is in two."""

Keep = Callable[[str, Callable[[], Tensors]], Tensors]
"""Stages.get: the tensors of a finished stage, or what the function computes now."""

NOISE_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """How exits are trained and chosen.

    Args:
      head: what a head is and how it is trained.
      rules: which exits and thresholds a plan may have.
      candidates: depths of the heads; None takes every block from the end of the first third on.
      kappa: drop candidates whose INR is below kappa times their mean; 0 drops none.
    """

    head: HeadOptions = BEST_HEAD
    rules: Rules = Rules()
    candidates: tuple[int, ...] | None = None
    kappa: float = 0.0


BEST = Recipe()
"""Without labels, exits chosen by data; what it rests on: bench/NOTES.md."""

PAPER = Recipe(PAPER_HEAD, Rules(4, "paper", is_subset_chosen=False), (8, 9, 10, 11), kappa=0.5)
"""arXiv 2605.26415, for a tower of 12 blocks; needs labels."""


@dataclass(frozen=True)
class Task:
    """The settings of a calibration; see lraee.calibrate."""

    recipe: Recipe
    goal: Goal
    gate: GateKind
    classes: Tensor | None
    labels: Tensor | None
    logit_scale: float
    seed: int
    is_timed: bool


# Steps


def choose_candidates(recipe: Recipe, noise: Sequence[BlockNoise]) -> tuple[list[int], list[int]]:
    """Depths that get a head, and those that pathological layer pruning drops.

    Args:
      recipe: its candidates and kappa.
      noise: of each block of the tower.
    Raises: ValueError on candidates outside the tower, and where none is left.
    """
    depth = len(noise)
    wanted = recipe.candidates or range(max(1, depth // 3), depth)
    wrong = [block for block in wanted if not 1 <= block < depth]
    if wrong:
        raise ValueError(f"calibrate: candidates must be 1 to {depth - 1}, got {wrong[0]}")
    inr = {block: noise[block - 1].inr for block in sorted(set(wanted))}
    dropped = pathological(inr, recipe.kappa)
    kept = [block for block in inr if block not in dropped]
    if not kept:
        raise ValueError(
            "calibrate: candidates must be one at least, got none: the tower has"
            f" {depth} blocks, and noise drops {dropped}"
        )
    return kept, dropped


def collect_views(
    source: FeatureSource, blocks: Sequence[int], rows: Tensor, *, views: int, seed: int, keep: Keep
) -> list[dict[str, Tensor]]:
    """Pooled tokens of the marked images: the centre crop, then `views` random crops.

    Args:
      source: runs the towers.
      blocks: depths of the candidates.
      rows: bool [n].
      views: random crops per image.
      seed: of the crops.
      keep: where views are kept.
    """
    result = []
    for view in range(views + 1):
        pooled = partial(
            source.pooled, blocks, rows, view_seed=None if view == 0 else 1000 * seed + view
        )
        result.append(keep(f"view {view}", pooled))
    return result


def train_heads(
    views: Sequence[Mapping[str, Tensor]],
    blocks: Sequence[int],
    task: Task,
    *,
    labels: Tensor | None,
    keep: Keep,
    progress: bool,
) -> dict[int, HeadWeights]:
    """Depth -> trained head.

    Args:
      views: from collect_views.
      blocks: depths of the candidates.
      task: recipe, seed, classes and logit scale.
      labels: int64, of the images of one view, or None.
      keep: where heads are kept.
      progress: show bars.
    """
    teacher = torch.cat([view["teacher"] for view in views])
    repeated = None if labels is None else labels.repeat(len(views))
    options, heads = task.recipe.head, {}
    P = views[0]["pooled"].shape[2] // (1 if options.has_class_token else 2)
    for place, block in enumerate(blocks):

        def train(place: int = place) -> Tensors:
            pooled = torch.cat([view["pooled"][:, place, :P] for view in views])
            return train_head(
                pooled, teacher, options=options, seed=task.seed, classes=task.classes,
                labels=repeated, logit_scale=task.logit_scale, progress=progress,
            ).tensors()  # fmt: skip

        heads[block] = HeadWeights.of(keep(f"head {block}", train))
    return heads


@dataclass(frozen=True)
class Features:
    """All that plans are made from: trained heads, and their probes on held-out images.

    Args:
      task: the settings.
      embeddings: from FeatureSource.embeddings, all n images.
      splits: from split_images.
      noise: of each block.
      candidates, dropped: from choose_candidates.
      heads: from train_heads.
      probes: from FeatureSource.probed, of the held-out images in their order.
      costs: from probe_costs.
    """

    task: Task
    embeddings: Mapping[str, Tensor]
    splits: Mapping[str, Tensor]
    noise: Sequence[BlockNoise]
    candidates: Sequence[int]
    dropped: Sequence[int]
    heads: Mapping[int, HeadWeights]
    probes: Mapping[str, Tensor]
    costs: Costs

    @property
    def classes(self) -> Tensor:
        """What probes compare with; a stand-in where the task has no classes."""
        return _classes_or_one(self.task, self.heads)

    def table(self, split: str, *, is_proof: bool) -> ExitTable:
        """The exits on one split, shuffled: a test that bets on one image after another needs an
        order that is independent of them.

        Args:
          split: "gate" or "thresholds".
          is_proof: see targets.judge.
        Raises: ValueError where the task has labels and none of the split is known.
        """
        task, embeddings = self.task, self.embeddings
        held_out = _held_out(self.splits).nonzero()[:, 0]
        inside = self.splits[split][held_out].nonzero()[:, 0]
        source = torch.Generator().manual_seed(task.seed + 1)
        inside = inside[torch.randperm(len(inside), generator=source)]
        labels = None if task.labels is None else task.labels[held_out[inside]]
        if labels is not None:
            inside, labels = inside[labels >= 0], labels[labels >= 0]
            if not len(labels):
                raise ValueError(f"calibrate: labels must be known in the {split} split, got none")
        rows, learned = held_out[inside], self.splits["heads"]
        # Not the held-out images: what one of them loses must not depend on the others
        index = Index({name: each[learned] for name, each in embeddings.items()})
        return judge(
            {name: each[inside] for name, each in self.probes.items()},
            {name: each[rows] for name, each in embeddings.items()},
            classes=task.classes,
            labels=labels,
            index=index,
            is_proof=is_proof,
        )


def _held_out(splits: Mapping[str, Tensor]) -> Tensor:
    """Images that no head is trained on, bool [n]."""
    return splits["gate"] | splits["thresholds"]


def _classes_or_one(task: Task, heads: Mapping[int, HeadWeights]) -> Tensor:
    return one_class(next(iter(heads.values()))) if task.classes is None else task.classes


def collect_features(
    source: FeatureSource,
    task: Task,
    *,
    keep: Keep,
    keep_head: Keep,
    shares: Mapping[str, float] = SPLITS,
    parts: PartFlops | None = None,
) -> Features:
    """Split, collect features, train heads and probe the held-out images.

    Args:
      source: runs the towers.
      task: the settings.
      keep, keep_head: where finished stages and heads are kept.
      shares: of the images, as SPLITS.
      parts: what FLOPs are counted as; None counts what the int8 tower runs.
    """
    embeddings = keep("embeddings", source.embeddings)
    n, labels = len(embeddings["full"]), task.labels
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"calibrate: labels must have shape [n] = [{n}], got {list(labels.shape)}")
    splits = split_images(embeddings, shares=shares, seed=task.seed)
    noise = source.noise(NOISE_IMAGES)
    blocks, dropped = choose_candidates(task.recipe, noise)
    learned = splits["heads"]
    views = collect_views(
        source, blocks, learned, views=task.recipe.head.views, seed=task.seed, keep=keep
    )
    heads = train_heads(
        views, blocks, task, labels=None if labels is None else labels[learned], keep=keep_head,
        progress=source.progress,
    )  # fmt: skip
    classes = _classes_or_one(task, heads)
    probes = keep(
        "probes",
        lambda: source.probed(
            heads, _held_out(splits), classes=classes, logit_scale=task.logit_scale
        ),
    )
    costs = probe_costs(heads, classes, parts or PartFlops.as_run(find_tower(source.fast)))
    return Features(task, embeddings, splits, noise, blocks, dropped, heads, probes, costs)


def measure_probe_time(source: FeatureSource, features: Features) -> ProbeTime | None:
    """How long a probe takes beside the tower; None where it is not to be measured."""
    if not features.task.is_timed:
        return None
    block, head = next(iter(features.heads.items()))
    time = measure(source.fast, block, head, features.classes, features.task.logit_scale)
    if time.probe_share > OVERHEAD:
        _log.warning(
            "calibrate: one probe takes %.1f %% of the tower's time here, the larger of batch"
            " sizes %s: so much slower is a batch in which no image exits",
            100 * time.probe_share, BATCHES,
        )  # fmt: skip
    return time


def limit_exits(rules: Rules, time: ProbeTime | None) -> Rules:
    """The rules with no more exits than their probes may cost time, unless the number is fixed."""
    if time is None or rules.num_exits is not None or not rules.is_subset_chosen:
        return rules
    return replace(rules, max_exits=min(rules.max_exits, time.most_exits))


def make_plans(
    features: Features, goal: Goal, rules: Rules
) -> tuple[dict[str, Plan], dict[str, dict[str, Any]]]:
    """The plan of the task's gate and those of the baselines, with what they did on the threshold
    split, as JSON.

    Raises: ValueError if the task's gate has no plan for the goal.
    """
    task, is_proof = features.task, goal.epsilon is not None
    kinds: tuple[GateKind, ...] = CLASS_FREE if task.classes is None else get_args(GateKind)
    tables = [features.table(name, is_proof=is_proof) for name in ("gate", "thresholds")]
    plans, figures = {}, {}
    for kind in dict.fromkeys((task.gate, *kinds)):
        try:
            plans[str(kind)], figures[str(kind)] = make_plan(
                kind, list(features.heads), *tables, costs=features.costs, goal=goal, rules=rules
            )
        except ValueError as error:
            if kind == task.gate:
                raise
            _log.info("calibrate: no plan for the baseline %s: %s", kind, error)
    return plans, figures


def make_card(
    features: Features, time: ProbeTime | None, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """How the exits were trained and what was measured, as JSON."""
    task = features.task
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **{k: v for k, v in machine.describe().items() if k != "command"},
        "seed": task.seed,
        "recipe": asdict(task.recipe),
        "goal": asdict(task.goal),
        "classes": 0 if task.classes is None else len(task.classes),
        "labels": task.labels is not None,
        "images": {name: int(mask.sum()) for name, mask in features.splits.items()},
        "teacher_sha256": digest(features.embeddings["teacher"]),
        "candidates": list(features.candidates),
        "dropped": list(features.dropped),
        "noise": as_rows(features.noise),
        "time": None if time is None else asdict(time),
        "plans": dict(figures),
    }


@dataclass(frozen=True)
class Calibration:
    """One calibration.

    Args:
      source: the float and the int8 model, and the images.
      acceleration: how the int8 model was quantized.
      task: the settings.
      keep: where finished stages are kept.
    """

    source: FeatureSource
    acceleration: Acceleration
    task: Task
    keep: Keep

    def run(self) -> Exits:
        """All steps in order."""
        task = self.task
        features = collect_features(self.source, task, keep=self.keep, keep_head=self.keep)
        time = measure_probe_time(self.source, features)
        plans, figures = make_plans(features, task.goal, limit_exits(task.recipe.rules, time))
        return Exits(
            heads=features.heads,
            plans=plans,
            chosen=task.gate,
            classes=task.classes,
            logit_scale=task.logit_scale,
            compaction=Compaction() if time is None else Compaction(time.copy_share),
            scheme=self.acceleration.scheme,
            base_hash=self.acceleration.base_hash,
            card=make_card(features, time, figures),
        )


def digest(tensor: Tensor | None) -> str:
    """sha256 of a tensor's bytes; empty for None."""
    if tensor is None:
        return ""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)  # numpy has no bfloat16
    return hashlib.sha256(flat.numpy().data).hexdigest()
