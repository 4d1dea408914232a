"""Gates: from what a probe measured to one score per image, which exits at score >= threshold.

| kind | score | needs class texts |
|---|---|---|
| learned | sigmoid(w1 confidence + w2 margin + w3 variance + b), four numbers (LRA-EE) | yes |
| confidence | the largest probability | yes |
| patience | how many exits before this one gave the same class without a break (PABEE) | yes |
| agreement | sigmoid(w1 cosine with the embedding of the exit before + w3 variance + b) | no |
| static | 0: every image exits at the one exit there is | no |
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lraee.exits.kinds import GateKind as GateKind
from lraee.ops.reference import Probe, lane_sum, steady_sigmoid

CLASS_FREE: tuple[GateKind, ...] = ("agreement", "static")
"""Gates that read nothing of the classes."""


@dataclass(frozen=True)
class Gate:
    """The gate of all exits of a tower, in order of depth.

    Args:
      kind: see the table above.
      weights: per exit the four numbers of exit_probe's gate: factors of confidence (`agreement`:
        of the cosine), margin and variance, and the constant. Zeros where the kind has none.
      thresholds: per exit, exact in float32; inf closes an exit.
    Raises: ValueError where these do not fit each other.
    """

    kind: GateKind
    weights: tuple[tuple[float, float, float, float], ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError, see the class."""
        if self.kind not in get_args(GateKind):
            kinds = ", ".join(get_args(GateKind))
            raise ValueError(f"Gate: kind must be one of {kinds}, got {self.kind!r}")
        count = len(self.thresholds)
        if len(self.weights) != count:
            raise ValueError(
                f"Gate: weights and thresholds must have one row per exit, got {len(self.weights)}"
                f" and {count}"
            )
        if self.kind == "static" and count > 1:
            raise ValueError(f"Gate: a static gate must have one exit at most, got {count}")
        if not torch.tensor(self.weights, dtype=torch.float32).isfinite().all():
            raise ValueError(f"Gate: weights must be finite in float32, got {self.weights}")
        for threshold in self.thresholds:
            # Scores are float32: a threshold between two of them would mean different things
            if float(torch.tensor(threshold, dtype=torch.float32)) != threshold:
                raise ValueError(f"Gate: thresholds must be exact in float32, got {threshold}")

    @property
    def remembers(self) -> bool:
        """Whether a score needs the measurements of the exit before."""
        return self.kind in ("patience", "agreement")

    def vector(self, exit_index: int) -> Tensor:
        """Float32 [4] for exit_probe."""
        return torch.tensor(self.weights[exit_index], dtype=torch.float32)


@dataclass(frozen=True)
class Memory:
    """What the exit before measured of each image: its class, for how many exits, its direction."""

    top1: Tensor
    streak: Tensor
    direction: Tensor

    def rows(self, index: Tensor) -> "Memory":
        """The images of these rows."""
        return Memory(self.top1[index], self.streak[index], self.direction[index])


def score(
    gate: Gate, exit_index: int, probe: Probe, before: Memory | None
) -> tuple[Tensor, Memory | None]:
    """Scores float32 [B] at one exit, and what the next one needs.

    Each row depends on its own row alone, in one fixed order of sums. A score of NaN never exits:
    an image that is not finite, and the first exit of a gate that compares two.

    Args:
      gate: the gate.
      exit_index: 0 for the first exit.
      probe: what exit_probe gave for these images.
      before: what this function gave at the exit before; None at the first.
    """
    embedding, top1, confidence, _, variance, learned = probe
    if gate.kind == "learned":
        return learned, None
    if gate.kind == "confidence":
        return confidence, None
    if gate.kind == "static":
        return torch.zeros_like(confidence), None
    if gate.kind == "patience":
        streak = torch.zeros_like(top1)
        if before is not None:
            streak = torch.where(top1 == before.top1, before.streak + 1, 0)
        # A NaN image has top1 = 0 at every exit: it must not count as steady
        steady = torch.where(confidence.isnan(), confidence, streak.float())
        return steady, Memory(top1, streak, embedding[:, :0])
    direction = unit(embedding)
    if before is None:
        return torch.full_like(confidence, torch.nan), Memory(top1, top1, direction)
    cosine = lane_sum(direction * before.direction)
    w1, _, w3, constant = gate.weights[exit_index]
    logit = w1 * cosine + w3 * variance + constant
    return steady_sigmoid(logit), Memory(top1, top1, direction)


def unit(embedding: Tensor) -> Tensor:
    """Rows of length 1 [B, E], row by row the same bits."""
    length = lane_sum(embedding * embedding).sqrt().clamp(min=1e-12)
    return embedding / length[:, None]
