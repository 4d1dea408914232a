"""Segments of a tower: the stretches of work between two decisions of its router.

They are plain data, built once when exits are attached. A segment asks the tower for its parts
each time it runs, so modules, hooks and options count as they are then; copies of a tower share
its segments and run their own parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lraee.ops.reference import Probe


class TowerParts(Protocol):
    """What segments are made of; tokens are [R, L, D], class token first."""

    def embed(self, images: Tensor) -> Tensor:
        """Images [R, 3, H, W] -> tokens before the first block."""

    def run_blocks(self, z: Tensor, first: int, last: int) -> Tensor:
        """Tokens after blocks first to last - 1; after the last block of all maybe [R, 1, D]."""

    def probe(self, e: int, z: Tensor) -> Probe:
        """What exit e measures on tokens."""

    def may_overwrite(self, last: int) -> bool:
        """Whether the tokens after block last - 1 are held by no hook."""

    def finish(self, z: Tensor) -> Tensor:
        """Tokens after the last block -> embeddings [R, E]."""


@dataclass(frozen=True)
class Segment:
    """Blocks first to last - 1 of a tower, with what comes before and after them.

    Args:
      name: tells the segments of one tower apart.
      first, last: the blocks; none where they are equal.
      embeds: takes images.
      exit: number of the exit whose probe ends it, or None.
      finishes: gives embeddings.
    """

    name: str
    first: int
    last: int
    embeds: bool = False
    exit: int | None = None
    finishes: bool = False

    def run(self, tower: TowerParts, z: Tensor) -> tuple[Tensor, ...]:
        """Runs it, row by row: [R, …] -> tokens or embeddings, and the six tensors of a probe."""
        if self.embeds:
            z = tower.embed(z)
        if self.first < self.last:
            z = tower.run_blocks(z, self.first, self.last)
        if self.exit is not None:
            return (z, *tower.probe(self.exit, z))
        return (tower.finish(z) if self.finishes else z,)


@dataclass(frozen=True)
class Segments:
    """All segments of a tower.

    Args:
      whole: from images to embeddings, no exits.
      to_exits: each up to the probe of one exit, the first from images on.
      end: the blocks after the last exit; all of them, from images on, where there is none.
      finish: what follows the last block.
    """

    whole: Segment
    to_exits: tuple[Segment, ...]
    end: Segment
    finish: Segment

    @classmethod
    def of(cls, depth: int, exits: Sequence[int] = ()) -> "Segments":
        """Those of a tower of so many blocks with exits after these blocks, ascending."""
        starts = (0, *exits)
        return cls(
            whole=Segment("whole", 0, depth, embeds=True, finishes=True),
            to_exits=tuple(
                Segment(f"exit {e}", starts[e], block, embeds=e == 0, exit=e)
                for e, block in enumerate(exits)
            ),
            end=Segment("end", starts[-1], depth, embeds=not exits),
            finish=Segment("finish", depth, depth, finishes=True),
        )
