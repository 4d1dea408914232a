"""The router: which images exit after a probe, and which rows go on to the next block.

It calls nothing of the tower: a runner runs the blocks and the probes, and asks the router between
them. Survivors are compacted, so that later blocks run on fewer images; results come in input
order. Everything is row by row: an image exits at the same exit with the same bits in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lraee.exits.class_token import ClassTokenHead, ClassTokenWeights
from lraee.exits.gate import Gate, Memory, score
from lraee.exits.head import HeadWeights, Int8Head, TypedBuffers, contrasts, probe_tokens
from lraee.exits.record import Record, new_record
from lraee.layers.batch_invariant import output_dtype
from lraee.ops.backend import Backend
from lraee.ops.reference import Probe


@dataclass(frozen=True)
class Compaction:
    """When to drop the images that have exited: the break-even of copying and computing.

    The last images of the batch move into the places of those that exited. With R blocks to go,
    moving `moved` images costs copy_share * moved block-images and saves R * dropped of them.

    Args:
      copy_share: time to copy one image's tokens over the time of one block on it, as
        lraee.calibrate measures it. The default is above all measured so far.
    """

    copy_share: float = 0.1

    def pays(self, *, dropped: int, moved: int, blocks: int) -> bool:
        """Whether to drop so many rows, with `blocks` blocks to go."""
        return dropped * blocks > self.copy_share * moved


class Router(TypedBuffers):
    """Heads and gate of the exits of one tower.

    Args:
      blocks: after how many blocks each exit stands, ascending, below the tower's number.
      heads: one per exit.
      gate: of all exits.
      classes: unit text embeddings float32 [K, E]; any [1, E] where the gate reads no classes.
      logit_scale: factor of the cosine, exponentiated.
      compaction: when to drop the images that have exited.
      backend: which implementation of exit_probe to run on.
    """

    classes: Tensor
    contrasts: Tensor
    prefix_tokens: int = 1
    """Of the tower that it is attached to."""

    def __init__(
        self,
        blocks: Sequence[int],
        heads: Sequence[HeadWeights | ClassTokenWeights],
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
            ClassTokenHead(weights)
            if isinstance(weights, ClassTokenWeights)
            else Int8Head(weights, gate.vector(e), backend=backend)
            for e, weights in enumerate(heads)
        )
        self.training = False

    def set_classes(self, classes: Tensor) -> None:
        """Other unit text embeddings [K, E] in place of the old ones."""
        self.classes = classes.to(self.classes.device)
        self.contrasts = contrasts(self.classes)

    def probe(self, e: int, z: Tensor) -> Probe:
        """Exit e on tokens [R, L, D]: embedding, top1, confidence, margin, variance, score."""
        tokens = probe_tokens(z, self.prefix_tokens)
        return cast(Probe, self.heads[e](tokens, self.contrasts, self.logit_scale))

    def start(self, B: int, blocks: int, *, is_static: bool) -> "Routing":
        """The state of one call.

        Args:
          B: images.
          blocks: of the tower.
          is_static: tokens and probes lie in memory that the next segment overwrites.
        """
        record = new_record(self, B, exits=len(self.blocks), blocks=blocks)
        return Routing(self, list(range(B)), B, blocks, is_static, record)

    def note_full_depth(self, B: int, blocks: int) -> None:
        """Records a call that ran without exits."""
        record = new_record(self, B, exits=len(self.blocks), blocks=blocks)
        if record is not None:
            record.block_rows, record.finish_rows = [B] * blocks, B


@dataclass
class Routing:
    """One call on its way through the exits: after each probe `decide`, then `compact`; last
    `compact_all`, then `merge`.

    Args:
      router: heads, gate and compaction.
      places: input row of each row of tokens; -1 once it has exited.
      B: images of the call.
      blocks: of the tower.
      is_static: see Router.start.
      record: where the call is traced, or None.
    """

    router: Router
    places: list[int]
    B: int
    blocks: int
    is_static: bool
    record: Record | None
    depth: int = 0
    memory: Memory | None = None
    result: Tensor | None = None

    def decide(self, e: int, probe: Probe, z: Tensor) -> bool:
        """Takes the embeddings of the rows whose score reaches the threshold of exit e.

        Args:
          e: number of the exit.
          probe: of the tokens.
          z: tokens [R, L, D] after its block.
        Returns: whether a row exits here.
        """
        gate, depth = self.router.gate, self.router.blocks[e]
        if self.record is not None or gate.remembers:  # read again after the next segment
            probe = cast(Probe, tuple(self._kept(part) for part in probe))
        scores, self.memory = score(gate, e, probe, self.memory)
        threshold = gate.thresholds[e]
        each = enumerate(zip(self.places, scores.tolist(), strict=True))
        rows = [row for row, (place, s) in each if place >= 0 and s >= threshold]
        if self.record is not None:
            self.record.note_blocks(self.depth, depth, len(self.places))
            self.record.note_probe(e, self.places, probe, scores)
            self.record.note_exits([self.places[row] for row in rows], depth)
        self.depth = depth
        if rows:
            self._take(rows, probe[0].to(output_dtype(z)))
        return bool(rows)

    def _take(self, rows: list[int], embedding: Tensor) -> None:
        """These rows of embeddings [R, E] are results."""
        if len(rows) == self.B:
            self.result = self._kept(embedding)
        else:
            if self.result is None:
                self.result = embedding.new_empty(self.B, embedding.shape[1])
            self.result[[self.places[row] for row in rows]] = embedding[rows]
        for row in rows:
            self.places[row] = -1

    def _kept(self, tensor: Tensor) -> Tensor:
        """The tensor, in memory that no later segment overwrites."""
        return tensor.clone() if self.is_static else tensor

    @property
    def is_done(self) -> bool:
        """Whether images came and all have exited; `result` is then complete."""
        return bool(self.places) and max(self.places) < 0

    def compact(self, z: Tensor, *, is_own: bool) -> Tensor:
        """The tokens [R, L, D] without the rows that exited, where dropping them pays.

        Args:
          z: tokens after the exit.
          is_own: whether they may be overwritten: no hook holds them.
        """
        rows = self._survivors()
        moved = sum(place != row for place, row in enumerate(rows))
        dropped, blocks = len(self.places) - len(rows), self.blocks - self.depth
        if self.router.compaction.pays(dropped=dropped, moved=moved, blocks=blocks):
            return self._keep(rows, z, is_own=is_own)
        return z

    def compact_all(self, z: Tensor) -> Tensor:
        """The tokens after the last block, without any row that exited."""
        if self.record is not None:
            self.record.note_blocks(self.depth, self.blocks, len(self.places))
        rows = self._survivors()
        return self._keep(rows, z, is_own=False) if len(rows) < len(self.places) else z

    def merge(self, y: Tensor) -> Tensor:
        """All embeddings [B, E]: those of the exits, and y [R, E] of the rows that stayed."""
        if self.record is not None:
            self.record.finish_rows += len(self.places)
        if self.result is None:
            return self._kept(y)
        self.result[self.places] = y.to(self.result.dtype)
        return self.result

    def _survivors(self) -> list[int]:
        """Rows that have not exited; the last of them fill the holes of those that have, so few
        rows move: dropping costs by the number of images that exited.
        """
        count = sum(place >= 0 for place in self.places)
        last = [row for row in range(count, len(self.places)) if self.places[row] >= 0]
        return [row if self.places[row] >= 0 else last.pop() for row in range(count)]

    def _keep(self, rows: list[int], z: Tensor, *, is_own: bool) -> Tensor:
        """These rows of the tokens; in place where they may be overwritten."""
        index = torch.tensor(rows, dtype=torch.int64, device=z.device)
        if is_own or self.is_static:
            holes = [place for place, row in enumerate(rows) if place != row]
            if holes:
                into = torch.tensor(holes, dtype=torch.int64, device=z.device)
                z.index_copy_(0, into, z.index_select(0, index[into]))
            z = z[: len(rows)]
        else:
            z = z.index_select(0, index)
        self.places = [self.places[row] for row in rows]
        if self.memory is not None:
            self.memory = self.memory.rows(index)
        return z
