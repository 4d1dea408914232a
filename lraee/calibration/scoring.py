"""Measurements of every candidate exit on one split of images, and the scores of gates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lraee.calibration.thresholds import NEVER, ScoreTable, exit_at
from lraee.exits.gate import Gate, GateKind, Memory, score
from lraee.exits.head import HeadWeights
from lraee.exits.plan import Plan
from lraee.ops.reference import Probe, steady_sigmoid
from lraee.towers.flops import PartFlops

Weights = tuple[float, float, float, float]
NO_WEIGHTS: Weights = (0.0, 0.0, 0.0, 0.0)
Subset = tuple[int, ...]
"""Indices of candidates, ascending."""


@dataclass(frozen=True)
class ExitTable:
    """Measurements of m candidate exits on n images of one split.

    Args:
      embedding: float32 [n, m, E].
      top1: int64 [n, m].
      features: float32 [n, m, 3], confidence, margin, variance.
      is_correct: bool [n, m], what a gate learns to predict: the answer is the label, or the
        float model's.
      gain: float64 [n, m + 1], what thresholds maximise; last column at full depth.
      loss: float64 [n, m + 1] in [0, 1], what epsilon bounds.
      is_signed: losses are drops in {-1, 0, 1}, mapped by risk.signed_loss.
    """

    embedding: Tensor
    top1: Tensor
    features: Tensor
    is_correct: Tensor
    gain: NDArray[np.float64]
    loss: NDArray[np.float64]
    is_signed: bool

    def probe(self, e: int, weights: Weights) -> Probe:
        """What exit_probe gives at candidate e with this gate.

        All but the score of a learned gate has the same bits: exit_probe has a sigmoid of its own,
        and differs in the last of them. Thresholds lie between scores, so decisions are the same.
        """
        confidence, margin, variance = self.features[:, e].unbind(1)
        g0, g1, g2, g3 = torch.tensor(weights, dtype=torch.float32).unbind()
        learned = steady_sigmoid(((g0 * confidence + g1 * margin) + g2 * variance) + g3)
        return self.embedding[:, e], self.top1[:, e], confidence, margin, variance, learned

    def losses(
        self, table: ScoreTable, subset: Subset, thresholds: Sequence[Sequence[float]]
    ) -> NDArray[np.float64]:
        """Loss of each image under each choice of thresholds, [n, len(thresholds)]."""
        columns = np.asarray([*subset, self.loss.shape[1] - 1])
        rows = np.arange(len(self.loss))
        exits = [exit_at(table.scores, each) for each in thresholds]
        return np.stack([self.loss[rows, columns[e]] for e in exits], axis=1)


@dataclass(frozen=True)
class Costs:
    """FLOPs of one image.

    Args:
      when_leaving: indices of candidates -> FLOPs of exiting at each of them, then at none.
      full: of the tower without exits.
    """

    when_leaving: Callable[[Sequence[int]], list[int]]
    full: int


def probe_costs(heads: Mapping[int, HeadWeights], classes: Tensor, parts: PartFlops) -> Costs:
    """FLOPs of exiting at any choice of these heads, probes charged."""
    blocks = list(heads)
    probes = [2 * (head.macs + classes.numel()) for head in heads.values()]

    def when_leaving(subset: Sequence[int]) -> list[int]:
        return parts.when_leaving([blocks[e] for e in subset], [probes[e] for e in subset])

    return Costs(when_leaving, parts.total)


def run_plan(plan: Plan, blocks: Sequence[int], table: ExitTable, costs: Costs) -> "PlanResult":
    """What a plan does to images whose probes are known; `blocks` are the candidates' depths."""
    subset = tuple(blocks.index(block) for block in plan.blocks)
    if not subset:
        at = np.full(len(table.gain), table.gain.shape[1] - 1)
        return PlanResult(at, float(table.gain[:, -1].mean()), 0.0)
    scores = score_table(plan.gate.kind, table, subset, plan.gate.weights, costs)
    exits = exit_at(scores.scores, plan.gate.thresholds)
    gain = scores.gains[np.arange(len(exits)), exits].mean()
    at = np.asarray([*subset, table.gain.shape[1] - 1])[exits]
    return PlanResult(at, float(gain), 1.0 - float(scores.costs[exits].mean()) / costs.full)


@dataclass(frozen=True)
class PlanResult:
    """A plan on a split.

    Args:
      at: the candidate where each image exited, m at full depth; int64 [n].
      gain: mean over images.
      flops_saved: of the full tower's, probes charged.
    """

    at: NDArray[np.int64]
    gain: float
    flops_saved: float


def exit_scores(
    kind: GateKind, split: ExitTable, subset: Subset, weights: tuple[Weights, ...]
) -> NDArray[np.float32]:
    """Scores [n, len(subset)], as the router computes them; see ExitTable.probe."""
    gate = Gate(kind, weights, (NEVER,) * len(subset))
    columns: list[Tensor] = []
    memory: Memory | None = None
    for place, e in enumerate(subset):
        column, memory = score(gate, place, split.probe(e, weights[place]), memory)
        columns.append(column)
    return torch.stack(columns, dim=1).numpy()


def score_table(
    kind: GateKind, split: ExitTable, subset: Subset, weights: tuple[Weights, ...], costs: Costs
) -> ScoreTable:
    """Scores, gains and costs of the exits of the subset."""
    columns = [*subset, split.gain.shape[1] - 1]
    return ScoreTable(
        exit_scores(kind, split, subset, weights),
        split.gain[:, columns],
        np.asarray(costs.when_leaving(subset), dtype=np.float64),
    )
