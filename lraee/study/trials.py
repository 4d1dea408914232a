"""One recipe trained with one seed on one backbone, and what its plans do to report photos."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lraee.calibration.gate_fitting import fit_weights
from lraee.calibration.pipeline import Features, Recipe, Task, collect_features
from lraee.calibration.plans import Goal, make_plan
from lraee.calibration.scoring import ExitTable, Weights, exit_scores, run_plan
from lraee.calibration.targets import judge, nearest
from lraee.calibration.thresholds import PAPER_GRID
from lraee.exits.bundle import Exits
from lraee.exits.gate import Gate, GateKind
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.model.acceleration import Acceleration, acceleration_of
from lraee.storage.stages import Stages, Tensors
from lraee.study.backbones import Model
from lraee.study.cached_features import CachedFeatures, Leads
from lraee.towers.families import find_tower
from lraee.towers.flops import PartFlops

_log = logging.getLogger("lraee")


@dataclass(frozen=True)
class Backbone:
    """One form of the model beside the photos that exits learn from and those reported on.

    Args:
      name: "float", "int8", "paper", or one of these with SmoothQuant.
      model: the study's.
      learn, report: the pairs of the same form.
      labels, report_labels: int64 [n], of the photos of each.
      stages: where heads are kept.
      splits: shares of the photos that heads, gates and thresholds learn from.
    """

    name: str
    model: Model
    learn: CachedFeatures
    report: CachedFeatures
    labels: Tensor
    report_labels: Tensor
    stages: Stages
    splits: Mapping[str, float]

    @cached_property
    def acceleration(self) -> Acceleration:
        """How the form was quantized."""
        acceleration = acceleration_of(self.learn.fast)
        assert acceleration is not None
        return acceleration

    @cached_property
    def parts(self) -> PartFlops:
        """FLOPs of the tower's parts as the paper counts them, all tokens in every block.

        So they are the same for all backbones, though not all of them run the last block so.
        """
        return PartFlops.of(find_tower(self.learn.fast))

    @cached_property
    def full_top1(self) -> Tensor:
        """The answers at full depth on report photos, int64 [n]."""
        return nearest(self.report.view(0)["full"], self.model.classes)

    @cached_property
    def float_top1(self) -> Tensor:
        """The float model's answers at full depth on report photos, int64 [n]."""
        return nearest(self.report.view(0)["teacher"], self.model.classes)

    def leading(self, leads: Leads) -> "Backbone":
        """The same backbone, with the class token in the patch mean's place or back."""
        return replace(self, learn=self.learn.leading(leads), report=self.report.leading(leads))


@dataclass(frozen=True)
class Outcome:
    """What one plan did to n report photos.

    Args:
      exits: depths of its m exits.
      taken: the index of the exit where each photo exited, m at full depth; int64 [n].
      exit_block: the depth of that exit, or the number of blocks; int64 [n].
      right: whether the answer it got is the label, bool [n].
      agreement: share of answers that are the float model's at full depth.
      flops_saved: share of the full tower's, probes charged.
      scores: float32 [n, m], NaN where a photo did not get there.
      top1_at_exit: int64 [n, m], of every photo.
      confidence_at_exit: float32 [n, m], of every photo.
      right_at_exit: bool [n, m], of every photo.
    """

    exits: tuple[int, ...]
    taken: Tensor
    exit_block: Tensor
    right: Tensor
    agreement: float
    flops_saved: float
    scores: Tensor
    top1_at_exit: Tensor
    confidence_at_exit: Tensor
    right_at_exit: Tensor


class Trial:
    """One recipe with one seed on one backbone; each step runs when it is first needed.

    Args:
      backbone: see Backbone; `leading` decides which half a head of one half takes.
      recipe: how exits are trained and chosen.
      seed: of splits and heads.
      has_labels: gates and thresholds count the labels, else agreement with the float model.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, seed: int, *, has_labels: bool) -> None:
        """See the class."""
        self.backbone, self.recipe, self.seed = backbone, recipe, seed
        labels, model = backbone.labels if has_labels else None, backbone.model
        self._task = Task(
            recipe, Goal(budget=0.8), "learned", model.classes, labels, model.logit_scale, seed,
            False,
        )  # fmt: skip
        self._plans: dict[tuple[GateKind, float], Plan | None] = {}

    @cached_property
    def features(self) -> Features:
        """Splits, heads and probes of the learning side.

        Heads are kept by all that they depend on, and nothing else is: views are cached elsewhere.
        Recipes that train the same heads on the same photos share them.
        """
        learn = self.backbone.learn
        prefix = f"{learn.name} {learn.leads} {self.seed} {_key(self.recipe, self.backbone)}"

        def keep_head(name: str, make: Callable[[], Tensors]) -> Tensors:
            return self.backbone.stages.get(f"{prefix} {name}", make)

        return collect_features(
            learn, self._task, keep=Stages(None, None).get, keep_head=keep_head,
            shares=self.backbone.splits, parts=self.backbone.parts,
        )  # fmt: skip

    @property
    def blocks(self) -> list[int]:
        """Depths of the heads."""
        return list(self.features.heads)

    def plan(self, kind: GateKind, budget: float) -> Plan | None:
        """The plan of one kind of gate, chosen on the learning side; None if none fits."""
        key = kind, budget
        if key not in self._plans:
            try:
                self._plans[key] = self._make_plan(kind, Goal(budget=budget))
            except ValueError as error:
                _log.info("report: %s: no %s plan: %s", self.backbone.name, kind, error)
                self._plans[key] = None
        return self._plans[key]

    def plan_within(self, budget: float) -> Plan:
        """The learned plan of this budget, or open_plan where the gates are too unsure for it."""
        return self.plan("learned", budget) or self.open_plan()

    def open_plan(self) -> Plan:
        """All exits with the learned gate at the lowest threshold of the paper's grid.

        For a recipe whose gates are too unsure for any budget: their thresholds go no lower.
        """
        blocks = tuple(self.blocks)
        lowest = float(np.float32(PAPER_GRID[0]))
        gate = Gate("learned", self.gate_weights("learned", blocks), (lowest,) * len(blocks))
        return Plan(blocks, gate)

    def exits(self, plan: Plan) -> Exits:
        """What lraee.accelerate takes to run a plan."""
        acceleration, model = self.backbone.acceleration, self.backbone.model
        return Exits(
            heads=self.features.heads, plans={"chosen": plan}, chosen="chosen",
            classes=model.classes, logit_scale=model.logit_scale, compaction=Compaction(),
            scheme=acceleration.scheme, base_hash=acceleration.base_hash, card={},
        )  # fmt: skip

    def probe_share(self, plan: Plan) -> float:
        """FLOPs of all probes of a plan over those of the full tower."""
        costs, columns = self.features.costs, self.columns(plan.blocks)
        return costs.when_leaving(columns)[-1] / costs.full - 1.0

    def _make_plan(self, kind: GateKind, goal: Goal) -> Plan:
        gate, thresholds = self._learning_splits
        plan, _ = make_plan(
            kind, self.blocks, gate, thresholds,
            costs=self.features.costs, goal=goal, rules=self.recipe.rules,
        )  # fmt: skip
        return plan

    @cached_property
    def _learning_splits(self) -> tuple[ExitTable, ExitTable]:
        gate, thresholds = (
            self.features.table(split, is_proof=False) for split in ("gate", "thresholds")
        )
        return gate, thresholds

    def gate_weights(self, kind: GateKind, blocks: Sequence[int]) -> tuple[Weights, ...]:
        """The gates of these exits, fitted on the gate split."""
        return fit_weights(kind, self._learning_splits[0], self.columns(blocks))

    def columns(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Where these exits stand among the heads."""
        return tuple(self.blocks.index(block) for block in blocks)

    @cached_property
    def table(self) -> ExitTable:
        """The exits on report photos; gain is 1 where the answer is the label."""
        backbone = self.backbone
        probes = backbone.report.probed(
            self.features.heads, torch.ones(len(backbone.report_labels), dtype=torch.bool),
            classes=backbone.model.classes, logit_scale=backbone.model.logit_scale,
        )  # fmt: skip
        return judge(
            probes, backbone.report.embeddings(),
            classes=backbone.model.classes, labels=backbone.report_labels,
        )  # fmt: skip

    def outcome(self, plan: Plan) -> Outcome:
        """What a plan does to the report photos."""
        table, blocks, backbone = self.table, self.blocks, self.backbone
        result = run_plan(plan, blocks, table, self.features.costs)
        at = torch.from_numpy(result.at)
        answers = torch.cat([table.top1, backbone.full_top1[:, None]], 1)
        top1 = answers.gather(1, at[:, None])[:, 0]
        depths = torch.tensor([*blocks, backbone.model.depth])
        columns = list(self.columns(plan.blocks))
        exit_block = depths[at]
        return Outcome(
            exits=plan.blocks,
            taken=(exit_block[:, None] > torch.tensor(plan.blocks)).sum(1),
            exit_block=exit_block,
            right=top1 == backbone.report_labels,
            agreement=float((top1 == backbone.float_top1).double().mean()),
            flops_saved=result.flops_saved,
            scores=self._scores(plan, exit_block),
            top1_at_exit=table.top1[:, columns],
            confidence_at_exit=table.features[:, columns, 0],
            right_at_exit=table.is_correct[:, columns],
        )

    def _scores(self, plan: Plan, exit_block: Tensor) -> Tensor:
        if not plan.blocks:
            return torch.empty(len(exit_block), 0)
        columns = self.columns(plan.blocks)
        raw = exit_scores(plan.gate.kind, self.table, columns, plan.gate.weights)
        scores = torch.from_numpy(np.array(raw))
        reached = exit_block[:, None] >= torch.tensor(plan.blocks)[None]
        return torch.where(reached, scores, torch.nan)


def _key(recipe: Recipe, backbone: Backbone) -> str:
    """What of recipe and splits the heads depend on, short enough for a file name."""
    text = json.dumps([asdict(recipe.head), dict(backbone.splits)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
