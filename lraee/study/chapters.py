"""One chapter per backbone: its trials, and the parts of the report that they fill."""

from dataclasses import replace
from functools import cached_property

from torch import Tensor

from lraee.calibration.head_training import Training
from lraee.data.photos import Photos
from lraee.exits.gate import GateKind
from lraee.exits.plan import Plan
from lraee.study import factorial, gates, schema
from lraee.study.attribution import CorrectPhotos
from lraee.study.examples import Answers, examples
from lraee.study.protocol import PAPER_BUDGET, Protocol
from lraee.study.quadrants import quadrants
from lraee.study.rows import (
    frontier_point,
    row_of_full_depth,
    row_of_outcomes,
    shares_of,
)
from lraee.study.schema import (
    Cost,
    Example,
    FactorialRow,
    FrontierPoint,
    MainRow,
    Pruned,
    Quadrants,
    Shares,
    Sweep,
)
from lraee.study.trials import Backbone, Outcome, Trial

BASELINES: dict[str, GateKind] = {
    schema.PABEE: "patience",
    schema.CONFIDENCE: "confidence",
    schema.STATIC: "static",
}
"""Systems that share our heads."""


class Chapter:
    """All trials of one backbone, each run when it is first needed.

    Args:
      form: the backbone.
      protocol: how the study is run.
    """

    def __init__(self, form: Backbone, protocol: Protocol) -> None:
        """See the class."""
        self.form, self.protocol = form, protocol

    # Trials, one per seed

    @property
    def _is_quantized(self) -> bool:
        return self.form.name != "float"

    @cached_property
    def best(self) -> list[Trial]:
        """Our recipe, without labels."""
        recipe = self.protocol.best()
        return [Trial(self.form, recipe, s, has_labels=False) for s in self.protocol.seeds]

    @cached_property
    def paper(self) -> list[Trial]:
        """LRA-EE as published, with labels."""
        return self._published(self.form, "both")

    def _published(self, form: Backbone, training: Training) -> list[Trial]:
        recipe = self.protocol.paper(form.model.depth, prunes=self._is_quantized)
        recipe = replace(recipe, head=replace(recipe.head, training=training))
        return [Trial(form, recipe, seed, has_labels=True) for seed in self.protocol.seeds]

    @property
    def recipes(self) -> dict[str, tuple[list[Trial], list[Plan]]]:
        """Recipe -> its trials and the learned plan of each."""
        budgets = {schema.PUBLISHED: PAPER_BUDGET, schema.BEST: self.protocol.budget}
        trials = {schema.PUBLISHED: self.paper, schema.BEST: self.best}
        return {
            name: (trials[name], [trial.plan_within(budget) for trial in trials[name]])
            for name, budget in budgets.items()
        }

    @cached_property
    def outcomes(self) -> dict[str, list[Outcome]]:
        """Recipe -> what its learned plans did, by seed."""
        return {
            schema.PUBLISHED: self.published_outcomes,
            schema.BEST: _within(self.best, self.protocol.budget),
        }

    @cached_property
    def published_outcomes(self) -> list[Outcome]:
        """What the paper's exits did, by seed."""
        return _within(self.paper, PAPER_BUDGET)

    # Parts of the report

    def main(self) -> list[MainRow]:
        """Full depth, both recipes, class-token exits, and the baselines on our heads."""
        name, budget = self.form.name, self.protocol.budget
        rows = [row_of_full_depth(schema.FULL_DEPTH, name, self.form)]
        rows += [
            row_of_outcomes(recipe, name, each, self._note(recipe))
            for recipe, each in self.outcomes.items()
        ]
        by_class_token = self._published(self.form.leading("class token"), "both")
        rows.append(
            row_of_outcomes(
                schema.CLASS_TOKEN, name, _within(by_class_token, PAPER_BUDGET),
                f"heads of the paper on the class token alone, budget {PAPER_BUDGET}",
            )
        )  # fmt: skip
        for baseline, kind in BASELINES.items():
            outcomes = self._baseline(kind, budget)
            if outcomes:
                note = f"on our heads, budget {budget}{_where(outcomes, baseline)}"
                rows.append(row_of_outcomes(baseline, name, outcomes, note))
        return rows

    def _note(self, recipe: str) -> str:
        if recipe == schema.BEST:
            return f"no labels, budget {self.protocol.budget}"
        is_open = any(trial.plan("learned", PAPER_BUDGET) is None for trial in self.paper)
        reach = "out of reach: every threshold at its lowest" if is_open else ""
        dropped = self.paper[0].features.dropped
        return f"labels, budget {PAPER_BUDGET} {reach}".strip() + (
            f", exit {', '.join(map(str, dropped))} dropped" if dropped else ", no exit dropped"
        )

    def _baseline(self, kind: GateKind, budget: float) -> list[Outcome]:
        """By seed; empty unless each seed has a plan within the budget."""
        plans = [trial.plan(kind, budget) for trial in self.best]
        pairs = zip(self.best, plans, strict=True)
        return [] if None in plans else [t.outcome(plan) for t, plan in pairs if plan is not None]

    def quadrants(self) -> list[Quadrants]:
        """Of both recipes."""
        return [
            quadrants(
                [each.right for each in outcomes],
                self.right_full,
                has_exited=outcomes[0].taken < len(outcomes[0].exits),
                gate_scores=outcomes[0].scores,
                right_at_exit=outcomes[0].right_at_exit,
                exits=outcomes[0].exits,
                labels=self.form.report_labels,
                class_names=self.form.model.class_names,
                backbone=self.form.name,
                recipe=recipe,
            )
            for recipe, outcomes in self.outcomes.items()
        ]

    @property
    def right_full(self) -> Tensor:
        """Whether full depth is right, bool [n]."""
        return self.form.full_top1 == self.form.report_labels

    def correct_photos(self) -> CorrectPhotos:
        """For the share of a rescue that is due to quantization."""
        right = {name: [o.right for o in each] for name, each in self.outcomes.items()}
        return CorrectPhotos(self.form.name, right, self.right_full)

    def shares(self) -> list[Shares]:
        """Of both recipes."""
        name = self.form.name
        return [shares_of(name, recipe, each) for recipe, each in self.outcomes.items()]

    def sweeps(self) -> list[Sweep]:
        """Of both recipes: all exits of the paper's, those that our plans chose."""
        result = []
        for name, (trials, plans) in self.recipes.items():
            exits = [
                tuple(trial.blocks) if name == schema.PUBLISHED else plan.blocks
                for trial, plan in zip(trials, plans, strict=True)
            ]
            if all(exits):
                points = self.protocol.sweep_points
                result.append(gates.sweep(name, trials, exits, points=points))
        return result

    def pruned(self) -> Pruned:
        """The noisiest exit of the paper's, kept and left out."""
        return gates.pruned(self.form, self.paper, name=schema.PUBLISHED, budget=PAPER_BUDGET)

    def factorial(self) -> list[FactorialRow]:
        """(i) to (v); distilled is the paper's sum of labels and distillation."""
        form, seeds = self.form, self.protocol.seeds
        by_labels = _within(self._published(form, "labels"), PAPER_BUDGET)
        return [
            factorial.full_depth(form),
            factorial.last_block(form, "(ii)", "labels", seeds),
            factorial.last_block(form, "(iii)", "both", seeds),
            factorial.with_exits(form.name, "(iv)", "labels", by_labels),
            factorial.with_exits(form.name, "(v)", "both", self.outcomes[schema.PUBLISHED]),
        ]

    def examples(self, photos: Photos, names: list[str]) -> list[Example]:
        """Of our recipe, first seed."""
        outcome, form = self.outcomes[schema.BEST][0], self.form
        full = form.report.view(0)["full"]
        cosine = full / full.norm(dim=1, keepdim=True) @ form.model.classes.T
        probability = (form.model.logit_scale * cosine).softmax(1).amax(1)
        answers = Answers(
            blocks=(*outcome.exits, form.model.depth),
            top1=outcome.top1_at_exit,
            confidence=outcome.confidence_at_exit,
            full_top1=form.full_top1,
            full_probability=probability,
            taken=outcome.taken,
        )
        return examples(
            photos, names, answers, labels=form.report_labels, class_names=form.model.class_names,
            backbone=form.name,
        )  # fmt: skip

    def frontier(self) -> list[FrontierPoint]:
        """Both recipes and the baselines, at each budget that every seed can keep."""
        systems: list[tuple[str, list[Trial], GateKind]] = [
            (schema.BEST, self.best, "learned"),
            (schema.PUBLISHED, self.paper, "learned"),
            *((baseline, self.best, kind) for baseline, kind in BASELINES.items()),
        ]
        points = []
        for name, trials, kind in systems:
            for budget in self.protocol.frontier_budgets:
                plans = [trial.plan(kind, budget) for trial in trials]
                if None not in plans:
                    outcomes = [
                        t.outcome(p) for t, p in zip(trials, plans, strict=True) if p is not None
                    ]
                    points.append(frontier_point(name, self.form.name, budget, outcomes))
        return points

    def costs(self, time_saved: float | None) -> list[Cost]:
        """Of both recipes; the time is of our recipe, see lraee.study.latency."""
        return [
            {
                "name": recipe,
                "backbone": self.form.name,
                "flops_saved": 100.0
                * sum(o.flops_saved for o in self.outcomes[recipe])
                / len(plans),
                "time_saved": time_saved if recipe == schema.BEST else None,
                "head_share": 100.0
                * sum(t.probe_share(p) for t, p in zip(trials, plans, strict=True))
                / len(plans),
            }
            for recipe, (trials, plans) in self.recipes.items()
        ]


def _within(trials: list[Trial], budget: float) -> list[Outcome]:
    return [trial.outcome(trial.plan_within(budget)) for trial in trials]


def _where(outcomes: list[Outcome], baseline: str) -> str:
    """The blocks of static exits, seed by seed."""
    if baseline != schema.STATIC:
        return ""
    depths = sorted({block for each in outcomes for block in each.exits})
    return f", after block {' or '.join(map(str, depths))}, chosen on the threshold split"
