"""From the measurements of candidate exits on held-out images to a plan: exits and thresholds.

Two goals: the best gain under a budget of FLOPs (LCT), or the most FLOPs saved under a bound on the
loss that holds with probability 1 - delta (Learn-then-Test). Two splits of images: gates are fitted
and exits chosen on the first, thresholds are searched or tested on the second.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from lraee.calibration import risk
from lraee.calibration.gate_fitting import fit_weights
from lraee.calibration.scoring import Costs, ExitTable, Subset, Weights, score_table
from lraee.calibration.thresholds import (
    NEVER,
    PAPER_GRID,
    Choice,
    ScoreTable,
    evaluate,
    exit_at,
    frontier,
    quantile_grid,
    search,
)
from lraee.exits.gate import Gate, GateKind
from lraee.exits.plan import Plan

QUANTILES = 24
"""Thresholds to try at each exit, beside "every image exits" and "no image exits"."""

PATH_STEPS = 60
"""Configurations on the path that Learn-then-Test walks."""


@dataclass(frozen=True)
class Goal:
    """What the thresholds are chosen for; exactly one of budget and epsilon is given.

    Args:
      budget: mean FLOPs of an image over those of the full tower, at most.
      epsilon: loss against full depth, at most, with probability 1 - delta.
      delta: see epsilon.
    """

    budget: float | None = None
    epsilon: float | None = None
    delta: float = 0.05

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if (self.budget is None) == (self.epsilon is None):
            raise ValueError(
                "calibrate: budget or epsilon must be given, one of the two, got"
                f" {self.budget} and {self.epsilon}"
            )
        for name in ("budget", "epsilon", "delta"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"calibrate: {name} must be in (0, 1), got {value}")


@dataclass(frozen=True)
class Rules:
    """Which exits and thresholds a plan may have.

    Args:
      max_exits: at most so many; agreement, which compares two, has two at least.
      grid: thresholds to try: quantiles of the scores, or the paper's 25 points.
      is_subset_chosen: pick the best exits among the candidates; else all of them are open.
      num_exits: pick so many, neither more nor fewer, whatever max_exits and is_subset_chosen say,
        and close none of them for a budget; agreement has two at least, static has one, patience
        all from some depth on. None leaves the number open.
    """

    max_exits: int = 3
    grid: Literal["quantile", "paper"] = "quantile"
    is_subset_chosen: bool = True
    num_exits: int | None = None


def make_plan(
    kind: GateKind,
    blocks: Sequence[int],
    gate_split: ExitTable,
    threshold_split: ExitTable,
    *,
    costs: Costs,
    goal: Goal,
    rules: Rules,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one kind of gate, and what it did on the threshold split, as JSON.

    Args:
      kind: of the gate.
      blocks: depth of each candidate, ascending.
      gate_split: for gates and the choice of exits.
      threshold_split: for thresholds; with epsilon, for the test alone.
      costs, goal, rules: see the classes.
    Raises: ValueError if no choice of exits fits the budget.
    """
    planner = _Planner(kind, costs, goal, rules)
    subset, weights = planner.choose_exits(gate_split, images=len(threshold_split.loss))
    table = score_table(kind, threshold_split, subset, weights, costs)
    figures: dict[str, Any] = {}
    if goal.epsilon is None:
        thresholds = planner.searched(table).thresholds
    else:
        path = planner.path(score_table(kind, gate_split, subset, weights, costs))
        thresholds, figures = planner.tested(path, table, threshold_split, subset)
    kept = _kept(kind, thresholds)
    exits = exit_at(table.scores, thresholds)
    shares = [float((exits == e).mean()) for e in (*kept, len(subset))]
    spent = costs.when_leaving([subset[e] for e in kept])
    spent_on_average = sum(share * flops for share, flops in zip(shares, spent, strict=True))
    rows = np.arange(len(exits))
    gate = Gate(kind, tuple(weights[e] for e in kept), tuple(thresholds[e] for e in kept))
    plan = Plan(tuple(blocks[subset[e]] for e in kept), gate)
    return plan, {
        "gate": kind,
        "exits": list(plan.blocks),
        "share": shares,
        "flops_saved": 1.0 - spent_on_average / costs.full,
        "gain": float(table.gains[rows, exits].mean()),
        "gain_at_full_depth": float(table.gains[:, -1].mean()),
        **figures,
    }


def _kept(kind: GateKind, thresholds: Sequence[float]) -> list[int]:
    """Exits worth a probe: no image exits at a closed one, but patience counts from the first on,
    and agreement compares with the one before.
    """
    opened = [e for e, threshold in enumerate(thresholds) if threshold < NEVER]
    if kind == "patience":
        return list(range(opened[-1] + 1)) if opened else []
    if kind == "agreement":
        return sorted({*opened, *(e - 1 for e in opened if e)})
    return opened


@dataclass(frozen=True)
class _Planner:
    """The arguments of make_plan."""

    kind: GateKind
    costs: Costs
    goal: Goal
    rules: Rules

    def choose_exits(self, split: ExitTable, *, images: int) -> tuple[Subset, tuple[Weights, ...]]:
        """The exits whose best choice of thresholds on the split is best, and their gates.

        With epsilon, the cheapest choice that would pass on so many images.
        """
        is_budget = self.goal.epsilon is None
        best: tuple[tuple[float, float], Subset, tuple[Weights, ...]] | None = None
        for subset in self._subsets(split.top1.shape[1]):
            weights = fit_weights(self.kind, split, subset)
            table = score_table(self.kind, split, subset, weights, self.costs)
            if is_budget:
                choice = self._affordable(table)
            else:
                choice = self._provable(table, split, subset, images)
            if choice is None:
                continue
            key = (choice.gain, -choice.cost) if is_budget else (-choice.cost, choice.gain)
            if best is None or key > best[0]:
                best = key, subset, weights
        if best is None:
            wish = f"budget of {self.goal.budget}" if is_budget else f"loss of {self.goal.epsilon}"
            raise ValueError(
                f"calibrate: the {self.kind} gate must reach the {wish}, got no exits that do; ask"
                " for less, or give other candidates"
            )
        return best[1], best[2]

    def _subsets(self, m: int) -> Iterator[Subset]:
        least = 2 if self.kind == "agreement" else 1
        if self.kind == "static":
            yield from ((e,) for e in range(m))
        elif self.kind == "patience":  # PABEE probes at every exit from some depth on
            yield from (tuple(range(first, m)) for first in range(max(m - 1, 1)))
        elif self.rules.num_exits is not None:
            size = max(least, self.rules.num_exits)
            if size > m:
                raise ValueError(
                    f"calibrate: num_exits must be at most the {m} candidates, got {size}"
                )
            yield from combinations(range(m), size)
        elif not self.rules.is_subset_chosen:
            yield tuple(range(m))
        else:
            for size in range(least, max(least, min(self.rules.max_exits, m)) + 1):
                yield from combinations(range(m), size)

    # Thresholds

    def path(self, table: ScoreTable) -> list[Choice]:
        """Choices from the safest to the cheapest; at the first no image exits."""
        count = table.scores.shape[1]
        no_exits = evaluate(table, [NEVER] * count)
        if self.kind == "static":
            return [no_exits, evaluate(table, [-NEVER])]
        if self.kind == "patience":
            steps = range(count - 1, 0, -1)
            return [no_exits, *(evaluate(table, [float(step)] * count) for step in steps)]
        choices = frontier(table, grids=self._grids(table))
        return [no_exits, *choices[:: -(-len(choices) // PATH_STEPS)]]

    def _grids(self, table: ScoreTable) -> list[tuple[float, ...]]:
        if self.rules.grid == "paper":
            return [PAPER_GRID] * table.scores.shape[1]
        # -inf: every image exits, where all scores are alike too
        grids = [(-NEVER, *quantile_grid(column, QUANTILES)) for column in table.scores.T]
        if self.rules.num_exits is None or self.goal.epsilon is not None:
            return grids
        return [grid[:-1] if len(grid) > 2 else grid for grid in grids]  # NEVER closes an exit

    def _affordable(self, table: ScoreTable) -> Choice | None:
        """The best choice within the budget, or None."""
        most = (self.goal.budget or 1.0) * self.costs.full
        if self.kind in ("static", "patience"):
            cheap = [choice for choice in self.path(table) if choice.cost <= most]
            return max(cheap, key=lambda choice: choice.gain, default=None)
        grids = self._grids(table)
        if evaluate(table, [grid[0] for grid in grids]).cost > most:
            return None
        return search(table, max_cost=most, grids=grids)

    def searched(self, table: ScoreTable) -> Choice:
        """The best choice within the budget; the cheapest where none is within it."""
        return self._affordable(table) or min(self.path(table), key=lambda choice: choice.cost)

    def _provable(
        self, table: ScoreTable, split: ExitTable, subset: Subset, images: int
    ) -> Choice | None:
        """The cheapest choice that would likely pass the test on so many images like these.

        By the normal approximation: it chooses, and proves nothing.
        """
        path = self.path(table)
        losses = split.losses(table, subset, [choice.thresholds for choice in path])
        z = NormalDist().inv_cdf(1.0 - self.goal.delta)
        upper = losses.mean(0) + z * losses.std(0) / math.sqrt(images)
        fails = np.append(upper > self._epsilon(split), True)
        passing = int(fails.argmax())
        return path[passing - 1] if passing else None

    def _epsilon(self, split: ExitTable) -> float:
        assert self.goal.epsilon is not None
        return risk.signed_epsilon(self.goal.epsilon) if split.is_signed else self.goal.epsilon

    def tested(
        self, path: list[Choice], table: ScoreTable, split: ExitTable, subset: Subset
    ) -> tuple[tuple[float, ...], dict[str, Any]]:
        """Learn-then-Test along the path, on images that were not used to choose it."""
        bound: risk.Bound = "betting" if split.is_signed else "hoeffding_bentkus"
        losses = split.losses(table, subset, [choice.thresholds for choice in path])
        last = risk.learn_then_test(
            losses, epsilon=self._epsilon(split), delta=self.goal.delta, bound=bound
        )
        index = 0 if last is None else last
        mean = float(losses[:, index].mean())
        return path[index].thresholds, {
            "is_certified": last is not None,
            "epsilon": self.goal.epsilon,
            "delta": self.goal.delta,
            "bound": bound,
            "loss": 2.0 * mean - 1.0 if split.is_signed else mean,
            "images": len(losses),
            "step": index,
            "steps": len(path),
        }
