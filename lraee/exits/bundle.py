"""Exits: all that early exits of one tower need, as one saved object."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lraee.exits.gate import CLASS_FREE, Gate
from lraee.exits.head import HeadWeights
from lraee.exits.router import Compaction, Router
from lraee.layers.scheme import Scheme
from lraee.ops.backend import Backend


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
class Exits:
    """Heads of all candidate exits, and the plans that choose among them; from lraee.calibrate.

    Args:
      heads: depth in blocks -> the head that stands there.
      plans: by name; each uses some of the heads.
      chosen: the plan that accelerate(model, exits=…) runs.
      classes: unit text embeddings float32 [K, E] that the gates were made with, or None.
      logit_scale: factor of the cosine in the gates' softmax.
      compaction: when a batch drops the images that have left.
      scheme: how the tower was quantized that the heads were trained on.
      base_hash: towers.tower_hash of the float tower.
      card: how it was made and what it measured; JSON. Nothing is computed from it.
    Raises: ValueError where these do not fit each other.
    """

    heads: Mapping[int, HeadWeights]
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
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"Exits: logit_scale must be finite, got {self.logit_scale}")

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.plans[self.chosen]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the plans, the chosen one first."""
        return (self.chosen, *(name for name in self.plans if name != self.chosen))

    def using(self, name: str) -> "Exits":
        """The same exits with another plan chosen.

        Raises: ValueError if there is none of this name.
        """
        return replace(self, chosen=name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `exits.json` and a file of tensors; `Exits.load` gives the same exits again.

        Args:
          directory: made if it is not there; exits in it are replaced in one step.
        Raises: ValueError on what load would refuse.
        """
        from lraee.exits import serialization as files

        files.save(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Exits":
        """The exits that were saved, bit for bit, on the CPU. Nothing is unpickled.

        Raises: CheckpointError on files that are not those that were saved.
        """
        from lraee.exits import serialization as files

        return files.load(directory)

    def router(self, *, backend: Backend = "auto", device: torch.device | None = None) -> Router:
        """The module that runs the chosen plan.

        Raises: ValueError if its gate needs class texts and there are none.
        """
        plan = self.plan
        if self.classes is None and plan.gate.kind not in CLASS_FREE:
            raise ValueError(
                f"accelerate: exits must hold class texts for a {plan.gate.kind} gate, got none;"
                " calibrate with classes=…, or use the agreement gate"
            )
        heads = [self.heads[block] for block in plan.blocks]
        classes = (
            one_class(next(iter(self.heads.values()))) if self.classes is None else self.classes
        )
        router = Router(
            plan.blocks,
            heads,
            plan.gate,
            classes=classes,
            logit_scale=self.logit_scale,
            compaction=self.compaction,
            backend=backend,
        )
        return router if device is None else router.to(device)


def one_class(head: HeadWeights) -> Tensor:
    """A unit vector [1, E] for exit_probe where no classes are asked for."""
    last = head.w1 if head.w2 is None else head.w2
    classes = torch.zeros(1, last.shape[0])
    classes[0, 0] = 1.0
    return classes
