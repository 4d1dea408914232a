"""Exits: all that early exits of one tower need, as one saved object."""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lraee.exits import serialization
from lraee.exits.class_token import ClassTokenWeights
from lraee.exits.gate import CLASS_FREE
from lraee.exits.head import HeadWeights
from lraee.exits.plan import ExitsData, Plan
from lraee.exits.router import Router
from lraee.ops.backend import Backend


@dataclass(frozen=True)
class Exits(ExitsData):
    """Heads of all candidate exits, and the plans that choose among them; from lraee.calibrate.

    Args: see ExitsData.
    """

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
          directory: created if missing; exits in it are replaced in one step.
        Raises: ValueError on what load would refuse.
        """
        serialization.save(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Exits":
        """The exits that were saved, bit for bit, on the CPU. Nothing is unpickled.

        Raises: CheckpointError on files that are not those that were saved.
        """
        return serialization.load(directory, cls)

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


def one_class(head: HeadWeights | ClassTokenWeights) -> Tensor:
    """A unit vector [1, E] for exit_probe where no classes are given."""
    classes = torch.zeros(1, head.embedding_size)
    classes[0, 0] = 1.0
    return classes
