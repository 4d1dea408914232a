"""One cell of the dose study: one backbone at one dose with one seed, photo by photo.

A cell is tensors alone, so that it is kept as a stage and a run cut off goes on behind it. Every
comparison is kept as one value per report photo: paired differences need no bound.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from lraee.calibration.head_training import BEST_HEAD, PAPER_HEAD, train_head
from lraee.calibration.pipeline import NOISE_IMAGES
from lraee.exits.gate import GateKind
from lraee.storage.stages import Tensors
from lraee.study import gates, schema
from lraee.study.chapters import BASELINES
from lraee.study.factorial import last_head
from lraee.study.lens import answers, input_of
from lraee.study.protocol import PAPER_BUDGET, Protocol
from lraee.study.trials import Backbone, Outcome, Trial

SSA_LAST = "SSA head at the last block"
OUR_LAST = "our head at the last block"
RECIPES = (schema.PUBLISHED, schema.BEST)
SYSTEMS = (
    schema.FULL_DEPTH, schema.PUBLISHED, schema.BEST, schema.PABEE, schema.CONFIDENCE,
    schema.STATIC, SSA_LAST, OUR_LAST,
)  # fmt: skip
NOISE = ("natural_step", "quantization_error", "nsr", "mse", "cosine", "max_abs", "inr")
"""Fields of calibration.noise.BlockNoise."""

SHALLOW, GATE, PRUNING, DISTILLED = "shallow", "gate", "pruning", "distilled"
"""Names of comparisons, beside those of the baselines at equal FLOPs."""
_SAVINGS = 21


def measure(form: Backbone, protocol: Protocol, seed: int) -> Tensors:
    """All that one form of the model with one seed of splits and heads does to the report photos.

    Returns: of n photos, float64 where no type is given:
      `right NAME` bool [n], `agreement NAME` and `saved NAME` [], shares, of each system of SYSTEMS
        that has a plan;
      `exit block NAME` int64 [n], and of each exit alone `static blocks NAME` int64 [m] and
        `static right NAME` bool [n, m], of both recipes;
      `noise FIELD` [blocks], of a quantized form, like what follows;
      `gap NAME` float32 [n], of each comparison that could be run: right in one, not the other;
      `is dropped` bool [], whether pruning drops an exit.
    """
    cell = _Cell(form, protocol, seed)
    tensors = cell.systems()
    return tensors if form.name == "float" else tensors | cell.noise() | cell.gaps()


class _Cell:
    """The trials of one form with one seed."""

    def __init__(self, form: Backbone, protocol: Protocol, seed: int) -> None:
        self.form, self.protocol, self.seed = form, protocol, seed
        recipe = protocol.paper(form.model.depth, prunes=form.name != "float")
        self.paper = Trial(form, recipe, seed, has_labels=True)
        self.best = Trial(form, protocol.best(), seed, has_labels=False)

    def systems(self) -> Tensors:
        """Every system of SYSTEMS."""
        form, budget = self.form, self.protocol.budget
        full = form.full_top1
        agreement = _share(full == form.float_top1)
        tensors = _system(schema.FULL_DEPTH, full == form.report_labels, agreement, 0.0)
        trials = {schema.PUBLISHED: (self.paper, PAPER_BUDGET), schema.BEST: (self.best, budget)}
        for name, (trial, own_budget) in trials.items():
            outcome = trial.outcome(trial.plan_within(own_budget))
            tensors |= _outcome(name, outcome)
            tensors[f"exit block {name}"] = outcome.exit_block
            tensors[f"static blocks {name}"] = torch.tensor(trial.blocks)
            tensors[f"static right {name}"] = trial.table.is_correct
        for name, kind in BASELINES.items():
            plan = self.best.plan(kind, budget)
            if plan is not None:
                tensors |= _outcome(name, self.best.outcome(plan))
        for name, options in ((SSA_LAST, PAPER_HEAD), (OUR_LAST, self.protocol.best().head)):
            top1, saved = last_head(form, options, self.seed)
            agreement = _share(top1 == form.float_top1)
            tensors |= _system(name, top1 == form.report_labels, agreement, saved)
        return tensors

    def noise(self) -> Tensors:
        """By block, and whether pruning drops an exit."""
        rows = [asdict(row) for row in self.form.learn.noise(NOISE_IMAGES)]
        tensors = {
            f"noise {field}": torch.tensor([row[field] for row in rows], dtype=torch.float64)
            for field in NOISE
        }
        return tensors | {"is dropped": torch.tensor(bool(self.paper.features.dropped))}

    def gaps(self) -> Tensors:
        """Comparisons of two systems, photo by photo."""
        rows = {
            SHALLOW: self._shallow(),
            DISTILLED: self._distilled(),
            PRUNING: self._pruning(),
            GATE: self._gate(),
            schema.PABEE: self._above("patience"),
            schema.STATIC: self._above("static"),
        }
        return {f"gap {name}": row.float() for name, row in rows.items() if row is not None}

    def _shallow(self) -> Tensor:
        """A head on the patch mean - one on the class token, after the paper's first exit."""
        form = self.form
        place = round(2 * form.model.depth / 3) - 1
        options = replace(BEST_HEAD, steps=self.protocol.lens_steps, views=0, has_class_token=False)
        learn, report = form.learn.view(0), form.report.view(0)
        right = []
        for inputs in ("mean", "class token"):
            head = train_head(
                input_of(learn["pooled"][:, place], inputs), learn["teacher"],
                options=options, seed=self.seed,
            )  # fmt: skip
            top1 = answers(head, input_of(report["pooled"][:, place], inputs), form)
            right.append((top1 == form.report_labels).double())
        return right[0] - right[1]

    def _distilled(self) -> Tensor:
        """The paper's exits, labels and distillation - labels alone."""
        recipe = self.paper.recipe
        recipe = replace(recipe, head=replace(recipe.head, training="labels"))
        by_labels = Trial(self.form, recipe, self.seed, has_labels=True)
        return _right(self.paper, PAPER_BUDGET) - _right(by_labels, PAPER_BUDGET)

    def _pruning(self) -> Tensor | None:
        """Without the exit of lowest INR - with all; None where the tower has one candidate."""
        lowest = gates.lowest_inr(self.paper)
        candidates = self.paper.recipe.candidates or ()
        rest = tuple(block for block in candidates if block != lowest)
        if not rest:
            return None
        (without,), (kept,) = (
            gates.with_candidates(self.form, [self.paper], blocks, PAPER_BUDGET)
            for blocks in (rest, candidates)
        )
        return without.right.double() - kept.right.double()

    def _gate(self) -> Tensor | None:
        """Learned gate - confidence alone on the paper's heads, mean over equal FLOPs."""
        pairs = [(self.paper, tuple(self.paper.blocks))]
        kinds: tuple[GateKind, GateKind] = ("learned", "confidence")
        points = self.protocol.sweep_points
        curves = [
            _curve([outcomes[0] for _, outcomes in gates.swept(kind, pairs, points)])
            for kind in kinds
        ]
        return mean_gap(curves[0], curves[1])

    def _above(self, kind: GateKind) -> Tensor | None:
        """Our recipe at the FLOPs that a baseline on the same heads saves - that baseline."""
        baseline = self.best.plan(kind, self.protocol.budget)
        if baseline is None:
            return None
        budgets = {*self.protocol.frontier_budgets, self.protocol.budget}
        plans = [self.best.plan("learned", budget) for budget in sorted(budgets)]
        outcomes = [self.best.outcome(plan) for plan in plans if plan is not None]
        full = (0.0, (self.form.full_top1 == self.form.report_labels).double())
        outcome = self.best.outcome(baseline)
        ours = right_at([full, *_curve(outcomes)], outcome.flops_saved)
        return None if ours is None else ours - outcome.right.double()


Curve = Sequence[tuple[float, Tensor]]
"""FLOPs saved, and of each photo the chance to be right: float64 [n]."""


def right_at(curve: Curve, saved: float) -> Tensor | None:
    """On the line between the points beside this saving; None beyond the curve's ends.

    A line between two plans is what a coin decides that sends each photo through one of them.
    """
    ordered = sorted(curve, key=lambda point: point[0])
    savings = [point[0] for point in ordered]
    if not savings or not savings[0] <= saved <= savings[-1]:
        return None
    after = int(np.searchsorted(savings, saved))
    low, high = ordered[max(after - 1, 0)], ordered[after]
    share = (saved - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
    return (1.0 - share) * low[1] + share * high[1]


def mean_gap(better: Curve, worse: Curve) -> Tensor | None:
    """Mean difference over 21 savings that both curves reach, float64 [n]; None without any."""
    ends = [(min(s for s, _ in curve), max(s for s, _ in curve)) for curve in (better, worse)]
    low, high = max(end[0] for end in ends), min(end[1] for end in ends)
    if high <= low:
        return None
    gaps = []
    for saved in np.linspace(low, high, _SAVINGS).clip(low, high).tolist():
        one, other = right_at(better, saved), right_at(worse, saved)
        assert one is not None and other is not None
        gaps.append(one - other)
    return torch.stack(gaps).mean(0)


def _curve(outcomes: Sequence[Outcome]) -> Curve:
    return [(each.flops_saved, each.right.double()) for each in outcomes]


def _right(trial: Trial, budget: float) -> Tensor:
    return trial.outcome(trial.plan_within(budget)).right.double()


def _outcome(name: str, outcome: Outcome) -> Tensors:
    return _system(name, outcome.right, outcome.agreement, outcome.flops_saved)


def _system(name: str, right: Tensor, agreement: float, saved: float) -> Tensors:
    return {
        f"right {name}": right,
        f"agreement {name}": torch.tensor(agreement, dtype=torch.float64),
        f"saved {name}": torch.tensor(saved, dtype=torch.float64),
    }


def _share(marks: Tensor) -> float:
    return float(marks.double().mean())
