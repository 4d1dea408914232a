"""Exits of one call on its device: the router's decisions without the host.

Same scores, thresholds and order of survivors as lraee.exits.router.Routing, so the same bits. All
rows that exit are dropped: moving a row costs a tenth of a block at most, moved rows are never more
than dropped ones, and each dropped row spares a block at least.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.exits.gate import Gate
from lraee.kernels.exit_state import ExitState
from lraee.kernels.live_rows import LiveRows
from lraee.ops.reference import Probe


def gate_numbers(gate: Gate) -> tuple[float, ...]:
    """What ExitState.numbers holds of a gate, row by row."""
    rows = zip(gate.thresholds, gate.weights, strict=True)
    return tuple(number for t, (w1, _, w3, w4) in rows for number in (t, w1, w3, w4))


@dataclass(frozen=True)
class DeviceRouting:
    """One call on its way through the exits: after each probe `decide`, then `move`; last `merge`.

    Args:
      gate: its kind alone is read; thresholds and weights lie in state.numbers.
      blocks: after how many blocks each exit stands.
      depth: blocks of the tower.
      state: tables on the device.
    """

    gate: Gate
    blocks: Sequence[int]
    depth: int
    state: ExitState

    @classmethod
    def start(
        cls, gate: Gate, blocks: Sequence[int], depth: int, tables: tuple[Tensor, Tensor, Tensor]
    ) -> "DeviceRouting":
        """The state of one call.

        Args:
          gate, blocks, depth: see the class.
          tables: images, numbers and result of ExitState.allocate.
        """
        state = ExitState.allocate(*tables, compares=gate.kind == "agreement")
        return cls(gate, blocks, depth, state)

    def live(self, exits: int) -> LiveRows:
        """The images that are in the tower after so many exits."""
        return self.state.live(exits)

    def decide(self, e: int, probe: Probe) -> None:
        """Which images exit at exit e; nothing that blocks read is written.

        Args:
          probe: of the rows before it.
        """
        from lraee.kernels import exit_decide as kernels  # imports Triton

        how = {"learned": "given", "agreement": "given"}.get(self.gate.kind, self.gate.kind)
        if self.gate.kind == "agreement":
            score = kernels.agreement_score(self.state, e, probe[0], probe[4])
            probe = (*probe[:5], score)
        kernels.exit_decide(self.state, e, probe, how, self.blocks[e])

    def move(self, e: int, embedding: Tensor, z: Tensor) -> Tensor:
        """The tokens without the images that exited at exit e, whose embeddings are results.

        Args:
          embedding: of the probe.
          z: tokens [capacity, L, D]; where contiguous they are compacted in place.
        """
        from lraee.kernels import exit_decide as kernels  # imports Triton

        z = z.contiguous()
        kernels.exit_move(self.state, e, embedding, z)
        return z

    def merge(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [capacity, E] in input order, and depth and trace of ExitState.

        Args:
          y: embeddings of the rows that stayed to full depth.
        """
        from lraee.kernels import exit_decide as kernels  # imports Triton

        kernels.exit_merge(self.state, y.to(self.state.result.dtype), self.depth)
        return self.state.result, self.state.depth, self.state.trace


def reached(depth: Tensor, blocks: Sequence[int]) -> Tensor:
    """Bool [B, m]: the exits that each image came to, from the depth int32 [B] where it exited."""
    return depth[:, None] >= torch.tensor(blocks, dtype=depth.dtype, device=depth.device)
