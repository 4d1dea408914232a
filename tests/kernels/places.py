"""Where kernels run in a test: compiled on a GPU, or in Triton's interpreter."""

import copy
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import lraee
from lraee.exits.bundle import Exits
from lraee.kernels import register
from lraee.ops import backend, registry
from lraee.ops.backend import Backend

CALLERS = (
    "layers.int8_linear", "layers.int8_block", "layers.scheme", "layers.batch_invariant",
    "exits.head",
)  # fmt: skip
"""Modules of lraee that take operators from lraee.ops.backend."""


@dataclass(frozen=True)
class Place:
    """A device, and the operators that run there by the schemas of lraee.registry."""

    device: torch.device
    operators: Any

    def accelerate(self, model: nn.Module, exits: Exits | None = None) -> Any:
        """A copy of a float model of the CPU with int8 blocks, on the device."""
        if self.device.type == "cpu":
            return lraee.accelerate(model, backend="reference", exits=exits)
        there = copy.deepcopy(model).to(self.device)
        return lraee.accelerate(there, backend="triton", exits=exits)


CUDA = Place(torch.device("cuda"), backend.operators("triton"))
INTERPRETER = Place(
    torch.device("cpu"),
    SimpleNamespace(
        **{
            **registry.DEFINITIONS,
            **{
                name: register.implementation(name, registry.DEFINITIONS[name])
                for name in register.LAUNCHERS
            },
        }
    ),
)


def _operators(chosen: Backend) -> Any:
    return INTERPRETER.operators if chosen == "reference" else backend.operators(chosen)


@contextmanager
def at(name: str) -> Iterator[Place]:
    """The place of this name; inside, towers of the interpreter run the launchers.

    They are those with backend="reference"; what a test makes beside them stays fast.
    """
    if name == "cuda":
        yield CUDA
        return
    with ExitStack() as stack:
        for caller in CALLERS:
            module = importlib.import_module(f"lraee.{caller}")
            stack.enter_context(mock.patch.object(module, "operators", _operators))
        yield INTERPRETER
