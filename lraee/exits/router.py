"""The router: lets each image leave the tower at the first exit whose gate is sure of it.

Survivors are compacted, so that later blocks run on fewer images; results come in input order.
Everything is row by row: the same image leaves at the same exit with the same bits in any batch.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.gate import Gate, Memory, score
from lraee.exits.head import HeadWeights, Int8Head, TypedBuffers, contrasts, probe_tokens
from lraee.layers.batch_invariant import output_dtype
from lraee.ops.backend import Backend
from lraee.ops.reference import Probe

F = TypeVar("F", bound=Callable[..., Any])
Block = Callable[[Tensor], Tensor]
Segment = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Compaction:
    """When to drop the images that have left: the break-even of copying and computing.

    The last images of the batch move into the places of those that are gone. With R blocks to go,
    moving `moved` images costs copy_share * moved block-images and saves R * gone of them.

    Args:
      copy_share: time to copy one image's tokens over the time of one block on it, as
        lraee.calibrate measures it. The default is above all measured so far.
    """

    copy_share: float = 0.1

    def pays(self, *, gone: int, moved: int, blocks: int) -> bool:
        """Whether to move, with `blocks` blocks to go."""
        return gone * blocks > self.copy_share * moved


@dataclass
class Record:
    """What one traced call of B images did; m exits, L blocks.

    Args:
      exit_block: len B, after how many blocks each image left; L at full depth.
      block_rows, probe_rows: images that each block and each probe ran on.
      finish_rows: images that the last norm and projection ran on.
    """

    exit_block: list[int]
    block_rows: list[int]
    probe_rows: list[int]
    finish_rows: int = 0
    _seen: list[tuple[int, list[int], Tensor, Probe]] = field(default_factory=list)

    @classmethod
    def of(cls, B: int, *, exits: int, blocks: int) -> "Record":
        """B images of which nothing is known yet."""
        return cls([blocks] * B, [0] * blocks, [0] * exits)

    def note_exit(self, places: list[int], leaving: list[int], first: int, last: int) -> None:
        """Takes in that blocks first to last ran on these places, and which rows left then."""
        for depth in range(first, last):
            self.block_rows[depth] += len(places)
        for row in leaving:
            self.exit_block[places[row]] = last

    def note_probe(self, e: int, places: list[int], probe: Probe, scores: Tensor) -> None:
        """Takes in what exit e found of the images of these places; -1 is no image.

        It only keeps references: a traced call takes as long as another.
        """
        self.probe_rows[e] += len(places)
        self._seen.append((e, list(places), scores, probe))

    def scores(self) -> Tensor:
        """Float32 [B, m], NaN at exits that were not reached."""
        return self._table([])

    def features(self) -> Tensor:
        """Float32 [B, m, 3], confidence, margin, variance; NaN as scores."""
        return self._table([3])

    def _table(self, width: list[int]) -> Tensor:
        table = torch.full((len(self.exit_block), len(self.probe_rows), *width), math.nan)
        for e, places, scores, probe in self._seen:
            rows = [row for row, place in enumerate(places) if place >= 0]
            found = torch.stack(probe[2:5], dim=1) if width else scores
            table[[places[row] for row in rows], e] = found[rows].float().cpu()
        return table


_records: ContextVar[Mapping["Router", list[Record]] | None] = ContextVar("records", default=None)
_switched_off: ContextVar[frozenset["Router"]] = ContextVar("switched_off", default=frozenset())


def _eager(function: F) -> F:
    """Keeps torch.compile out: where images leave depends on their numbers."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Runner(Protocol):
    """How a segment is run: as it stands, or as a CUDA graph (lraee.graphs)."""

    @property
    def is_static(self) -> bool:
        """Whether results are overwritten when a segment runs again."""

    def __call__(self, name: Hashable, segment: Segment, z: Tensor) -> tuple[Tensor, ...]:
        """segment(z); the name tells segments of one tower apart."""

    def own(self, result: Tensor) -> Tensor:
        """A result that stays as it is."""


class Eager:
    """Segments as they stand."""

    is_static = False

    def __call__(self, name: Hashable, segment: Segment, z: Tensor) -> tuple[Tensor, ...]:
        """segment(z)."""
        return segment(z)

    def own(self, result: Tensor) -> Tensor:
        """Result itself."""
        return result


EAGER = Eager()


def _chain(steps: Sequence[Block]) -> Segment:
    """One step after the other; its result as a tuple."""

    def segment(z: Tensor) -> tuple[Tensor, ...]:
        for step in steps:
            z = step(z)
        return (z,)

    return segment


def _is_unseen(block: Block) -> bool:
    """Whether nobody but the router holds what the block returned: no hook has seen it."""
    return isinstance(block, nn.Module) and not block._forward_hooks


@dataclass
class _Flow:
    """Images on their way: tokens z [R, L, D], the input row of each (-1: it has left)."""

    z: Tensor
    places: list[int]
    memory: Memory | None = None

    def survivors(self) -> list[int]:
        """Rows of the images that have not left, those that fill holes in the places of the gone:
        so few rows move that dropping costs by the number of images that left.
        """
        count = sum(place >= 0 for place in self.places)
        last = [row for row in range(count, len(self.places)) if self.places[row] >= 0]
        return [row if self.places[row] >= 0 else last.pop() for row in range(count)]

    def keep(self, rows: list[int], *, is_own: bool) -> None:
        """Drops all rows but the survivors; in place where z `is_own`, seen by nobody else."""
        holes = [place for place, row in enumerate(rows) if place != row]
        index = torch.tensor(rows, dtype=torch.int64, device=self.z.device)
        if is_own:
            into = torch.tensor(holes, dtype=torch.int64, device=self.z.device)
            if holes:
                self.z.index_copy_(0, into, self.z.index_select(0, index[into]))
            self.z = self.z[: len(rows)]
        else:
            self.z = self.z.index_select(0, index)
        self.places = [self.places[row] for row in rows]
        if self.memory is not None:
            self.memory = self.memory.rows(index)


class Router(TypedBuffers):
    """Heads and gate of the exits of one tower.

    Args:
      blocks: after how many blocks each exit stands, ascending, below the tower's number.
      heads: one per exit.
      gate: of all exits.
      classes: unit text embeddings float32 [K, E]; any [1, E] where the gate reads no classes.
      logit_scale: factor of the cosine, exponentiated.
      compaction: when to drop the images that have left.
      backend: which implementation of exit_probe to run on.
    """

    classes: Tensor
    contrasts: Tensor
    prefix_tokens: int = 1
    """Of the tower that it is attached to."""

    def __init__(
        self,
        blocks: Sequence[int],
        heads: Sequence[HeadWeights],
        gate: Gate,
        *,
        classes: Tensor,
        logit_scale: float,
        compaction: Compaction | None = None,
        backend: Backend = "auto",
    ) -> None:
        """See the class."""
        super().__init__()
        self.blocks = tuple(blocks)
        self.gate = gate
        self.logit_scale = logit_scale
        self.compaction = compaction or Compaction()
        self.register_buffer("classes", classes.detach().float().clone())
        self.register_buffer("contrasts", contrasts(self.classes))
        self.heads = nn.ModuleList(
            Int8Head(weights, gate.vector(e), backend=backend) for e, weights in enumerate(heads)
        )
        self.training = False

    def set_classes(self, classes: Tensor) -> None:
        """Other unit text embeddings [K, E] in place of the old ones."""
        self.classes = classes.to(self.classes.device)
        self.contrasts = contrasts(self.classes)

    @property
    def is_off(self) -> bool:
        """Whether this thread runs at full depth, inside `switched_off`."""
        return self in _switched_off.get()

    @_eager
    def forward(
        self,
        blocks: Sequence[Block],
        z: Tensor,
        finish: Block,
        *,
        embed: Block | None = None,
        run: Runner = EAGER,
    ) -> Tensor:
        """Tokens [B, L, D] -> embeddings [B, E], in the type that the full tower gives.

        Args:
          blocks: of the tower, in order, [R, L, D] -> the same.
          z: tokens before the first block, or what `embed` makes them of.
          finish: what follows the last block, [R, L, D] -> [R, E].
          embed: [B, …] -> [B, L, D], part of the first segment.
          run: how the segments between exits are run.
        """
        B, depth = z.shape[0], 0
        record = self._new_record(B, len(blocks))
        flow, result = _Flow(z, list(range(B))), None
        for e, exit_depth in enumerate(self.blocks):
            steps = (
                blocks[depth:exit_depth] if embed is None or e else (embed, *blocks[:exit_depth])
            )
            flow.z, *probe = run(("exit", e, self.logit_scale), self._to_exit(e, steps), flow.z)
            embedding, leaving = self._leaving(e, flow, cast(Probe, probe), record, run)
            if record is not None:
                record.note_exit(flow.places, leaving, depth, exit_depth)
            depth = exit_depth
            if not leaving:
                continue
            embedding = embedding.to(output_dtype(flow.z))
            if len(leaving) == B:
                return run.own(embedding)
            if result is None:
                result = embedding.new_empty(B, embedding.shape[1])
            result[[flow.places[row] for row in leaving]] = embedding[leaving]
            is_own = run.is_static or _is_unseen(blocks[depth - 1])
            if not self._drop(flow, leaving, len(blocks) - depth, is_own=is_own):
                return result
        steps = blocks[depth:] if embed is None or self.blocks else (embed, *blocks)
        (flow.z,) = run("end", _chain(steps), flow.z)
        if record is not None:
            record.note_exit(flow.places, [], depth, len(blocks))
        return self._finish(flow, result, finish, record, run)

    def _to_exit(self, e: int, steps: Sequence[Block]) -> Segment:
        """The segment that ends with the probe of exit e: z, and the six of the probe."""
        steps_to = _chain(steps)

        def segment(z: Tensor) -> tuple[Tensor, ...]:
            (z,) = steps_to(z)
            tokens = probe_tokens(z, self.prefix_tokens)
            return (z, *self.heads[e](tokens, self.contrasts, self.logit_scale))

        return segment

    def _leaving(
        self, e: int, flow: _Flow, probe: Probe, record: Record | None, run: Runner
    ) -> tuple[Tensor, list[int]]:
        """Embeddings of all rows at exit e, and the rows that leave there."""
        if record is not None or self.gate.remembers:  # read again after the next segment
            probe = cast(Probe, tuple(run.own(part) for part in probe))
        scores, flow.memory = score(self.gate, e, probe, flow.memory)
        if record is not None:
            record.note_probe(e, flow.places, probe, scores)
        threshold = self.gate.thresholds[e]
        each = zip(flow.places, scores.tolist(), strict=True)
        return probe[0], [row for row, (at, s) in enumerate(each) if at >= 0 and s >= threshold]

    def _drop(self, flow: _Flow, leaving: list[int], blocks: int, *, is_own: bool) -> bool:
        """Marks the rows that left, drops them where that pays; False if none is left."""
        for row in leaving:
            flow.places[row] = -1
        rows = flow.survivors()
        moved = sum(place != row for place, row in enumerate(rows))
        gone = len(flow.places) - len(rows)
        if rows and self.compaction.pays(gone=gone, moved=moved, blocks=blocks):
            flow.keep(rows, is_own=is_own)
        return bool(rows)

    def _finish(
        self,
        flow: _Flow,
        result: Tensor | None,
        finish: Block,
        record: Record | None,
        run: Runner,
    ) -> Tensor:
        """The full-depth embeddings of those that stayed, put among the others."""
        rows = flow.survivors()
        if len(rows) < len(flow.places):  # some that left were carried along
            flow.keep(rows, is_own=False)
        (y,) = run("finish", _chain([finish]), flow.z)
        if record is not None:
            record.finish_rows += len(flow.places)
        if result is None:
            return run.own(y)
        result[flow.places] = y.to(result.dtype)
        return result

    # Tracing

    def _new_record(self, B: int, blocks: int) -> Record | None:
        """A record for this call, if this thread traces this router."""
        records = (_records.get() or {}).get(self)
        if records is None:
            return None
        records.append(Record.of(B, exits=len(self.blocks), blocks=blocks))
        return records[-1]

    def note_full_depth(self, B: int, blocks: int) -> None:
        """Records a call that ran without exits."""
        record = self._new_record(B, blocks)
        if record is not None:
            record.block_rows, record.finish_rows = [B] * blocks, B


@contextmanager
def recording(router: Router) -> Iterator[list[Record]]:
    """Collects a Record of each call of this router by this thread."""
    records: list[Record] = []
    token = _records.set({**(_records.get() or {}), router: records})
    try:
        yield records
    finally:
        _records.reset(token)


@contextmanager
def switched_off(router: Router) -> Iterator[None]:
    """Lets this thread's calls run to full depth."""
    token = _switched_off.set(_switched_off.get() | {router})
    try:
        yield
    finally:
        _switched_off.reset(token)
