"""Plans and the data of saved exits: what a file holds, without how it is run or written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lraee.exits.class_token import ClassTokenWeights
from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights
from lraee.exits.router import Compaction
from lraee.layers.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """Which exits are open, and the gate that stands at them.

    Args:
      blocks: after how many blocks each exit stands, ascending; none: every image runs to full
        depth.
      gate: one row per exit.
    Raises: ValueError where these do not fit each other.
    """

    blocks: tuple[int, ...]
    gate: Gate

    def __post_init__(self) -> None:
        """Raises ValueError, see the class."""
        if list(self.blocks) != sorted(set(self.blocks)) or min(self.blocks, default=1) < 1:
            raise ValueError(f"Plan: blocks must ascend from 1 on, got {list(self.blocks)}")
        if len(self.blocks) != len(self.gate.thresholds):
            raise ValueError(
                f"Plan: gate must have one row per exit, got {len(self.gate.thresholds)} for"
                f" {len(self.blocks)} exits"
            )


@dataclass(frozen=True)
class ExitsData:
    """Heads of all candidate exits, and the plans that choose among them.

    Args:
      heads: depth in blocks -> the head that stands there.
      plans: by name; each uses some of the heads.
      chosen: the plan that accelerate(model, exits=…) runs.
      classes: unit text embeddings float32 [K, E] that the gates were fitted with, or None.
      logit_scale: factor of the cosine in the gates' softmax.
      compaction: when a batch drops the images that have exited.
      scheme: how the tower was quantized that the heads were trained on.
      base_hash: towers.tower_hash of the float tower.
      card: how the exits were trained and what was measured; JSON. Nothing is computed from it.
    Raises: ValueError where these do not fit each other.
    """

    heads: Mapping[int, HeadWeights | ClassTokenWeights]
    plans: Mapping[str, Plan]
    chosen: str
    classes: Tensor | None
    logit_scale: float
    compaction: Compaction
    scheme: Scheme
    base_hash: str
    card: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError, see the class."""
        if not self.heads:
            raise ValueError("Exits: heads must hold one at least, got none")
        if self.chosen not in self.plans:
            names = ", ".join(self.plans) or "none"
            raise ValueError(f"Exits: chosen must be one of {names}, got {self.chosen!r}")
        for name, plan in self.plans.items():
            missing = sorted(set(plan.blocks) - set(self.heads))
            if missing:
                raise ValueError(
                    f"Exits: plan {name!r} must use heads that are there, got block {missing[0]}"
                )
            alone = [b for b in plan.blocks if isinstance(self.heads[b], ClassTokenWeights)]
            if alone and plan.gate.kind != "static":
                raise ValueError(
                    f"Exits: plan {name!r} must have a static gate where the class token runs on"
                    f" alone, got {plan.gate.kind!r} at block {alone[0]}"
                )
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"Exits: logit_scale must be finite, got {self.logit_scale}")
