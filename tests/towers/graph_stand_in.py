"""Graphs without CUDA: a stand-in that replays functions and is as careless with memory as CUDA."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lraee.towers import cuda_graphs as graphs
from lraee.towers import runner as vision
from lraee.towers.cuda_graphs import Captured, Function


class NoEvent:
    """An event of a device without streams."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def record(self) -> None:
        """Nothing to wait for later."""


class StandIn:
    """Captures segments as functions; each replay poisons the outputs of all others."""

    def __init__(self) -> None:
        self.outputs: list[tuple[Tensor, ...]] = []
        self.captures = self.replays = 0

    def capture(self, function: Function, padded: Tensor, pool: Any) -> tuple[Captured, Any]:
        outputs = tuple(part.clone() for part in function(padded))
        self.outputs.append(outputs)
        self.captures += 1
        self.poison()

        def replay() -> None:
            self.replays += 1
            results = function(padded)
            self.poison()
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result)

        return Captured(replay, padded, outputs), pool

    def poison(self) -> None:
        for outputs in self.outputs:
            for part in outputs:
                part.fill_(77)


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Towers of the CPU make graphs of all plain calls, with this stand-in."""
    graphs_of_functions = StandIn()
    monkeypatch.setattr(graphs, "capture", graphs_of_functions.capture)
    monkeypatch.setattr(graphs, "new_event", NoEvent)
    monkeypatch.setattr(graphs, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(
        vision.RowwiseTower,
        "_is_for_graphs",
        lambda tower, x: tower.cuda_graphs and 0 < len(x) <= 128 and not torch.is_grad_enabled(),
    )
    return graphs_of_functions
