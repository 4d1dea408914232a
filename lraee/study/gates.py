"""Threshold sweeps of two gates, and the noisiest exit kept or left out."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import numpy as np

from lraee.calibration.scoring import exit_scores
from lraee.exits.gate import Gate, GateKind
from lraee.exits.plan import Plan
from lraee.study.rows import row_of_outcomes, share_of
from lraee.study.schema import MainRow, Pruned, Sweep, SweepPoint
from lraee.study.trials import Backbone, Outcome, Trial

Exits = tuple[int, ...]


def sweep(recipe: str, trials: Sequence[Trial], exits: Sequence[Exits], *, points: int) -> Sweep:
    """Both gates on the same heads and exits, from "all images exit at once" to "nearly none does".

    Args:
      recipe: its name in the report.
      trials: one per seed, all of one backbone.
      exits: of each trial.
      points: thresholds, at even quantiles of the scores of all exits and seeds.
    """
    pairs = list(zip(trials, exits, strict=True))
    return {
        "backbone": trials[0].backbone.name,
        "recipe": recipe,
        "learned": _curve("learned", pairs, points),
        "confidence": _curve("confidence", pairs, points),
    }


def swept(
    kind: GateKind, pairs: Sequence[tuple[Trial, Exits]], points: int
) -> list[tuple[float, list[Outcome]]]:
    """Thresholds, ascending, and what one gate does at each, seed by seed; see sweep."""
    weights = [trial.gate_weights(kind, blocks) for trial, blocks in pairs]
    scores = np.concatenate(
        [
            exit_scores(kind, trial.table, trial.columns(blocks), each).ravel()
            for (trial, blocks), each in zip(pairs, weights, strict=True)
        ]
    )
    thresholds = np.unique(np.quantile(scores[np.isfinite(scores)], np.linspace(0, 1, points)))
    return [
        (
            threshold,
            [
                trial.outcome(Plan(blocks, Gate(kind, each, (threshold,) * len(blocks))))
                for (trial, blocks), each in zip(pairs, weights, strict=True)
            ],
        )
        for threshold in thresholds.astype(np.float32).tolist()
    ]


def _curve(kind: GateKind, pairs: list[tuple[Trial, Exits]], points: int) -> list[SweepPoint]:
    return [
        {
            "threshold": threshold,
            "flops_saved": 100.0 * mean(each.flops_saved for each in outcomes),
            "top1": 100.0 * mean(share_of(each.right) for each in outcomes),
            "agreement": 100.0 * mean(each.agreement for each in outcomes),
        }
        for threshold, outcomes in swept(kind, pairs, points)
    ]


def lowest_inr(trial: Trial) -> int:
    """The candidate of the paper's recipe with the lowest INR."""
    noise = trial.features.noise
    return min(trial.recipe.candidates or (), key=lambda block: noise[block - 1].inr)


def with_candidates(
    backbone: Backbone, trials: Sequence[Trial], blocks: Exits, budget: float
) -> list[Outcome]:
    """The same recipe with these candidates, none pruned; one per seed."""
    again = (
        Trial(backbone, replace(t.recipe, candidates=blocks, kappa=0.0), t.seed, has_labels=True)
        for t in trials
    )
    return [each.outcome(each.plan_within(budget)) for each in again]


def pruned(backbone: Backbone, trials: Sequence[Trial], *, name: str, budget: float) -> Pruned:
    """The exit of lowest INR kept and left out, whether or not the rule drops it.

    Args:
      backbone: the quantized form.
      trials: of the paper's recipe, with its pruning; one per seed.
      name, budget: of the rows.
    """
    first = trials[0]
    candidates = first.recipe.candidates or ()
    noise = first.features.noise
    inr = {block: noise[block - 1].inr for block in candidates}
    lowest = lowest_inr(first)
    rest = tuple(block for block in candidates if block != lowest)

    def row(blocks: Exits, note: str) -> MainRow:
        outcomes = with_candidates(backbone, trials, blocks, budget)
        return row_of_outcomes(name, backbone.name, outcomes, note)

    return {
        "backbone": backbone.name,
        "block": lowest,
        "inr_share_of_mean": 100.0 * inr[lowest] / mean(inr.values()),
        "is_dropped_by_rule": lowest in first.features.dropped,
        "kept": row(candidates, f"exits {_listed(candidates)}"),
        "left_out": row(rest, f"exits {_listed(rest)}"),
    }


def _listed(blocks: Exits) -> str:
    return ", ".join(map(str, blocks))
