"""One calibration, step by step: splits, heads, probes, time, plans, and the card that says so."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from lraee.calibration.collect import Pair
from lraee.calibration.head_training import BEST_HEAD, PAPER_HEAD, HeadOptions, train_head
from lraee.calibration.noise import BlockNoise, as_rows, pathological
from lraee.calibration.plans import Goal, Rules, make_plan
from lraee.calibration.probe_time import BATCHES, OVERHEAD, ProbeTime, measure
from lraee.calibration.scoring import Costs, Found
from lraee.calibration.targets import Index, judge
from lraee.exits.bundle import Exits, Plan, one_class
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.exits.head import HeadWeights
from lraee.exits.router import Compaction
from lraee.measurement import machine
from lraee.model.acceleration import Acceleration
from lraee.storage.stages import Stages
from lraee.towers.families import find_tower
from lraee.towers.flops import PartFlops

_log = logging.getLogger("lraee")

SPLITS = {"heads": 0.7, "gate": 0.1, "thresholds": 0.2}
"""Shares of the images, drawn by the seed; no image is in two."""

MIN_IMAGES = 100
NOISE_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """How exits are made.

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
    """What a calibration is asked for; see lraee.calibrate."""

    recipe: Recipe
    goal: Goal
    gate: GateKind
    classes: Tensor | None
    labels: Tensor | None
    logit_scale: float
    seed: int
    is_timed: bool


class Calibration:
    """The steps of one calibration; each is made when it is first asked for.

    Args:
      pair: the float and the int8 model, and the images.
      made: how the int8 model was made.
      task: what is asked for.
      stages: where finished work is kept.
      shares: of the images, as SPLITS.
      parts: what FLOPs are counted as; None counts what the int8 tower runs.
    """

    def __init__(
        self,
        pair: Pair,
        made: Acceleration,
        task: Task,
        stages: Stages,
        *,
        shares: Mapping[str, float] = SPLITS,
        parts: PartFlops | None = None,
    ) -> None:
        """See the class."""
        self._shares = shares
        self._pair, self._made, self._task, self._stages = pair, made, task, stages
        self._tower = find_tower(pair.fast)
        self._parts = parts or PartFlops.as_run(self._tower)

    def run(self) -> Exits:
        """Everything, in order."""
        plans, figures = self.plans(self._task.goal)
        time = self.probe_time
        return Exits(
            heads=self.heads,
            plans=plans,
            chosen=self._task.gate,
            classes=self._task.classes,
            logit_scale=self._task.logit_scale,
            compaction=Compaction() if time is None else Compaction(time.copy_share),
            scheme=self._made.scheme,
            base_hash=self._made.base_hash,
            card=self._card(figures),
        )

    # Images

    @cached_property
    def embeddings(self) -> dict[str, Tensor]:
        """`teacher` and `full`, [n, E]."""
        found = self._stages.get("embeddings", self._pair.embeddings)
        n, labels = len(found["full"]), self._task.labels
        if labels is not None and labels.shape != (n,):
            raise ValueError(
                f"calibrate: labels must have shape [n] = [{n}], got {list(labels.shape)}"
            )
        return found

    @cached_property
    def splits(self) -> dict[str, Tensor]:
        """Name -> which images, bool [n]; images that are not finite are in none."""
        whole = torch.cat([self.embeddings["teacher"], self.embeddings["full"]], dim=1)
        usable = whole.isfinite().all(1).nonzero()[:, 0]
        n = len(usable)
        if n < len(whole):
            _log.warning("calibrate: %d of %d images are not finite", len(whole) - n, len(whole))
        if n < MIN_IMAGES:
            raise ValueError(f"calibrate: images must be at least {MIN_IMAGES}, got {n}")
        source = torch.Generator().manual_seed(self._task.seed)
        order = usable[torch.randperm(n, generator=source)]
        masks, start = {}, 0
        for name, share in self._shares.items():
            stop = n if name == "thresholds" else start + round(share * n)
            masks[name] = torch.zeros(len(whole), dtype=torch.bool)
            masks[name][order[start:stop]] = True
            start = stop
        return masks

    # Heads

    @cached_property
    def noise(self) -> list[BlockNoise]:
        """The noise profile of the int8 tower."""
        return self._pair.noise(NOISE_IMAGES)

    @cached_property
    def dropped(self) -> list[int]:
        """Candidates that pathological layer pruning drops."""
        inr = {depth: self.noise[depth - 1].inr for depth in self._asked}
        return pathological(inr, self._task.recipe.kappa)

    @property
    def _asked(self) -> list[int]:
        depth = len(self._parts.blocks)
        asked = self._task.recipe.candidates or range(max(1, depth // 3), depth)
        wrong = [block for block in asked if not 1 <= block < depth]
        if wrong:
            raise ValueError(f"calibrate: candidates must be 1 to {depth - 1}, got {wrong[0]}")
        return sorted(set(asked))

    @property
    def candidates(self) -> list[int]:
        """Depths that get a head."""
        kept = [depth for depth in self._asked if depth not in self.dropped]
        if not kept:
            raise ValueError(
                "calibrate: candidates must be one at least, got none: the tower has"
                f" {len(self._parts.blocks)} blocks, and noise drops {self.dropped}"
            )
        return kept

    @cached_property
    def heads(self) -> dict[int, HeadWeights]:
        """Depth -> trained head."""
        views = self._views()
        teacher = torch.cat([view["teacher"] for view in views])
        labels = self._task.labels
        if labels is not None:
            labels = labels[self.splits["heads"]].repeat(len(views))
        options, heads = self._head_options, {}
        has_both = self._task.recipe.head.has_class_token or not self._pair.prefix_tokens
        for place, block in enumerate(self.candidates):
            P = views[0]["pooled"].shape[2] // (1 if has_both else 2)

            def train(place: int = place, P: int = P) -> dict[str, Tensor]:
                pooled = torch.cat([view["pooled"][:, place, :P] for view in views])
                return train_head(
                    pooled, teacher, options=options, seed=self._task.seed,
                    classes=self._task.classes, labels=labels,
                    logit_scale=self._task.logit_scale, progress=self._pair.progress,
                ).tensors()  # fmt: skip

            heads[block] = HeadWeights.of(self._stages.get(f"head {block}", train))
        return heads

    @property
    def _head_options(self) -> HeadOptions:
        """The recipe's; without a class token where the tower has none."""
        options = self._task.recipe.head
        return options if self._pair.prefix_tokens else replace(options, has_class_token=False)

    def _views(self) -> list[dict[str, Tensor]]:
        """The centre crop, then random crops, of the images that heads learn from."""
        rows, views = self.splits["heads"], []
        for view in range(self._task.recipe.head.views + 1):
            seed = None if view == 0 else 1000 * self._task.seed + view

            def look(seed: int | None = seed) -> dict[str, Tensor]:
                return self._pair.pooled(self.candidates, rows, view_seed=seed)

            views.append(self._stages.get(f"view {view}", look))
        return views

    @property
    def _classes(self) -> Tensor:
        """What probes compare with; a stand-in where there are no classes."""
        classes = self._task.classes
        return one_class(next(iter(self.heads.values()))) if classes is None else classes

    # Plans

    @cached_property
    def probe_time(self) -> ProbeTime | None:
        """How long a probe takes beside the tower; None where it is not to be measured."""
        if not self._task.is_timed:
            return None
        block, head = next(iter(self.heads.items()))
        time = measure(self._pair.fast, block, head, self._classes, self._task.logit_scale)
        if time.probe_share > OVERHEAD:
            _log.warning(
                "calibrate: one probe takes %.1f %% of the tower's time here, the worse of batch"
                " sizes %s: so much slower is a batch in which no image leaves",
                100 * time.probe_share, BATCHES,
            )  # fmt: skip
        return time

    def _rules(self) -> Rules:
        """The recipe's, with no more exits than their probes may cost time."""
        rules, time = self._task.recipe.rules, self.probe_time
        if time is None or not rules.is_subset_chosen:
            return rules
        return replace(rules, max_exits=min(rules.max_exits, time.most_exits))

    @property
    def costs(self) -> Costs:
        """FLOPs, probes charged."""
        blocks = list(self.heads)
        probes = [2 * (head.macs + self._classes.numel()) for head in self.heads.values()]

        def when_leaving(subset: Sequence[int]) -> list[int]:
            return self._parts.when_leaving(
                [blocks[e] for e in subset], [probes[e] for e in subset]
            )

        return Costs(when_leaving, self._parts.total)

    def plans(self, goal: Goal) -> tuple[dict[str, Plan], dict[str, dict[str, Any]]]:
        """The plan asked for and its rivals, with what they did on the threshold split."""
        task = self._task
        kinds: tuple[GateKind, ...] = CLASS_FREE if task.classes is None else get_args(GateKind)
        found = {name: self.found(name, goal) for name in ("gate", "thresholds")}
        plans, figures = {}, {}
        for kind in dict.fromkeys((task.gate, *kinds)):
            try:
                plans[str(kind)], figures[str(kind)] = make_plan(
                    kind, list(self.heads), found["gate"], found["thresholds"],
                    costs=self.costs, goal=goal, rules=self._rules(),
                )  # fmt: skip
            except ValueError as error:
                if kind == task.gate:
                    raise
                _log.info("calibrate: no plan for the rival %s: %s", kind, error)
        return plans, figures

    @property
    def _held_out(self) -> Tensor:
        """Images that heads did not see, bool [n]."""
        return self.splits["gate"] | self.splits["thresholds"]

    @cached_property
    def _probes(self) -> dict[str, Tensor]:
        """What probes find on the held-out images."""
        return self._stages.get(
            "probes",
            lambda: self._pair.probed(
                self.heads, self._held_out,
                classes=self._classes, logit_scale=self._task.logit_scale,
            ),
        )  # fmt: skip

    def found(self, split: str, goal: Goal) -> Found:
        """The probes of one split, shuffled: a test that bets on one image after another needs
        an order that says nothing of them.
        """
        held_out = self._held_out.nonzero()[:, 0]
        inside = self.splits[split][held_out].nonzero()[:, 0]
        source = torch.Generator().manual_seed(self._task.seed + 1)
        inside = inside[torch.randperm(len(inside), generator=source)]
        labels = None if self._task.labels is None else self._task.labels[held_out[inside]]
        if labels is not None:
            inside, labels = inside[labels >= 0], labels[labels >= 0]
            if not len(labels):
                raise ValueError(f"calibrate: labels must be known in the {split} split, got none")
        rows, learned = held_out[inside], self.splits["heads"]
        # Not the held-out images: what one of them loses must not depend on the others
        index = Index({name: each[learned] for name, each in self.embeddings.items()})
        return judge(
            {name: each[inside] for name, each in self._probes.items()},
            {name: each[rows] for name, each in self.embeddings.items()},
            classes=self._task.classes,
            labels=labels,
            index=index,
            is_proof=goal.epsilon is not None,
        )

    # The card

    def _card(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        task, time = self._task, self.probe_time
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            **{k: v for k, v in machine.describe().items() if k != "command"},
            "seed": task.seed,
            "recipe": asdict(task.recipe),
            "goal": asdict(task.goal),
            "classes": 0 if task.classes is None else len(task.classes),
            "labels": task.labels is not None,
            "images": {name: int(mask.sum()) for name, mask in self.splits.items()},
            "teacher_sha256": digest(self.embeddings["teacher"]),
            "candidates": self.candidates,
            "dropped": self.dropped,
            "noise": as_rows(self.noise),
            "time": None if time is None else asdict(time),
            "plans": dict(figures),
        }


def digest(tensor: Tensor | None) -> str:
    """sha256 of a tensor's bytes; empty for None."""
    if tensor is None:
        return ""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)  # numpy has no bfloat16
    return hashlib.sha256(flat.numpy().data).hexdigest()
