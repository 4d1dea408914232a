"""What exits did in a call, and full depth on demand: both for one thread and one router."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lraee.ops.reference import Probe


@dataclass
class Record:
    """What one traced call of B images did; m exits, L blocks.

    Args:
      exit_block: len B, after how many blocks each image exited; L at full depth.
      block_rows, probe_rows: images that each block and each probe ran on.
      finish_rows: images that the last norm and projection ran on.
    """

    exit_block: list[int]
    block_rows: list[int]
    probe_rows: list[int]
    finish_rows: int = 0
    _probes: list[tuple[int, list[int], Tensor, tuple[Tensor, ...]]] = field(default_factory=list)

    @classmethod
    def of(cls, B: int, *, exits: int, blocks: int) -> "Record":
        """B images before the first block."""
        return cls([blocks] * B, [0] * blocks, [0] * exits)

    def note_blocks(self, first: int, last: int, rows: int) -> None:
        """Blocks first to last - 1 ran on this many rows."""
        for depth in range(first, last):
            self.block_rows[depth] += rows

    def note_probe(self, e: int, places: list[int], probe: Probe, scores: Tensor) -> None:
        """Exit e probed the images of these places; -1 is a row that has exited.

        It only keeps references: a traced call takes as long as another.
        """
        self.probe_rows[e] += len(places)
        self._probes.append((e, list(places), scores, probe[2:5]))

    def note_exits(self, images: list[int], depth: int) -> None:
        """These images exited after so many blocks."""
        for image in images:
            self.exit_block[image] = depth

    def note_device(
        self, depth: Tensor, trace: Tensor, exits: Sequence[int], *, is_late: bool
    ) -> None:
        """What the tables of a call on the device say of it (see kernels.exit_state).

        Args:
          depth: int32 [B], trace: float32 [B, m, 4]; on the CPU.
          exits: after how many blocks each exit stands.
          is_late: images that exit still run through the next block.
        """
        self.exit_block = depth.tolist()
        for block in range(len(self.block_rows)):
            runs = (depth > block) | ((depth == block) & (is_late and block in exits))
            self.block_rows[block] += int(runs.sum())
        for e, block in enumerate(exits):
            places = (depth >= block).nonzero()[:, 0]
            scores, *features = trace[places, e].unbind(1)
            self.probe_rows[e] += len(places)
            self._probes.append((e, places.tolist(), scores, tuple(features)))
        self.finish_rows += self.exit_block.count(len(self.block_rows))

    def scores(self) -> Tensor:
        """Float32 [B, m], NaN at exits that were not reached."""
        return self._table([])

    def features(self) -> Tensor:
        """Float32 [B, m, 3], confidence, margin, variance; NaN as scores."""
        return self._table([3])

    def _table(self, width: list[int]) -> Tensor:
        table = torch.full((len(self.exit_block), len(self.probe_rows), *width), math.nan)
        for e, places, scores, features in self._probes:
            rows = [row for row, place in enumerate(places) if place >= 0]
            values = torch.stack(features, dim=1) if width else scores
            table[[places[row] for row in rows], e] = values[rows].float().cpu()
        return table


_records: ContextVar[Mapping[nn.Module, list[Record]] | None] = ContextVar("records", default=None)
_switched_off: ContextVar[frozenset[nn.Module]] = ContextVar("switched_off", default=frozenset())


def new_record(router: nn.Module, B: int, *, exits: int, blocks: int) -> Record | None:
    """A record of one call, if this thread records this router."""
    records = (_records.get() or {}).get(router)
    if records is None:
        return None
    records.append(Record.of(B, exits=exits, blocks=blocks))
    return records[-1]


@contextmanager
def recording(router: nn.Module) -> Iterator[list[Record]]:
    """Collects a Record of each call of this router by this thread."""
    records: list[Record] = []
    token = _records.set({**(_records.get() or {}), router: records})
    try:
        yield records
    finally:
        _records.reset(token)


@contextmanager
def not_recording() -> Iterator[None]:
    """Lets calls of this thread go unrecorded."""
    token = _records.set(None)
    try:
        yield
    finally:
        _records.reset(token)


def is_switched_off(router: nn.Module) -> bool:
    """Whether this thread runs at full depth, inside `switched_off`."""
    return router in _switched_off.get()


@contextmanager
def switched_off(router: nn.Module) -> Iterator[None]:
    """Lets this thread's calls run to full depth."""
    token = _switched_off.set(_switched_off.get() | {router})
    try:
        yield
    finally:
        _switched_off.reset(token)
