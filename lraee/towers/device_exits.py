"""A whole tower with exits as one function of its images: one CUDA graph, no wait of the host.

Blocks and probes run on all rows of the batch's bucket, and skip those beyond the count that the
last exit left on the device (lraee.kernels.live_rows). Few rows do not fill a GPU, and a probe is a
chain of dependent parts: there it runs on a stream of its own beside the next block, and images
that exit leave one block later. Either way each image gets the bits of the eager router.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lraee.exits.gate import Gate
from lraee.exits.head import Int8Head
from lraee.exits.on_device import DeviceRouting, gate_numbers
from lraee.exits.record import not_recording
from lraee.exits.router import Router
from lraee.kernels import live_rows
from lraee.kernels.live_rows import LiveRows
from lraee.ops.reference import Probe
from lraee.towers.cuda_graphs import Graphs, bucket_of
from lraee.towers.segments import Segments, TowerParts
from lraee.towers.spec import TowerSpec

_log = logging.getLogger("lraee")

Beside = Callable[[Callable[[], None]], Callable[[], None]]
"""Starts work; what it returns is called before its results are read."""

MOST_ROWS_BESIDE = 1024
"""Rows of tokens up to which a probe runs beside the next block.

An image that exits then runs through one block more. Of ViT-B/32 on an H200 a block took 42 us at
50 rows, 61 at 400 and 104 at 1,600: so 160 rows more of 800, a fifth, cost 6 us, and a probe and
its decision before the block 13 us (predicted). At 1,600 rows both are about even.
"""


def always_exits(gate: Gate) -> bool:
    """Whether every image exits at the one exit of a static gate, whose score is 0."""
    return gate.kind == "static" and gate.thresholds[0] <= 0.0


def is_beside(images: int, tokens: int) -> bool:
    """Whether probes run beside the next block, for so many images of a bucket."""
    return images * tokens <= MOST_ROWS_BESIDE


@dataclass(frozen=True)
class DeviceExits:
    """The exits of a tower in one function.

    Args:
      gate: its kind is read, and whether a static one is open; other thresholds and weights are in
        `numbers`.
      blocks: after how many blocks each exit stands, one at least.
      depth: blocks of the tower.
      embedding_size: E.
      images: int32 [1], images of the call; rows behind them are padding.
      numbers: see lraee.kernels.exit_state.
      beside: how probes run beside the next block; None where they run before it.
    """

    gate: Gate
    blocks: tuple[int, ...]
    depth: int
    embedding_size: int
    images: Tensor
    numbers: Tensor
    beside: Beside | None

    def run(self, tower: TowerParts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [R, …] -> embeddings [R, E], and depth and trace of ExitState, in input order."""
        z = tower.embed(x)
        if always_exits(self.gate):
            return self._static(tower, z)
        result = torch.empty((len(x), self.embedding_size), dtype=z.dtype, device=z.device)
        tables = self.images, self.numbers, result
        routing = DeviceRouting.start(self.gate, self.blocks, self.depth, tables)
        done = 0
        for e, block in enumerate(self.blocks):
            with live_rows.using(routing.live(e)):
                if done < block:
                    z = tower.run_blocks(z, done, block)
                z, embedding = self._pass(e, tower, routing, z)
                done = block + 1 if self.beside else block
            z = routing.move(e, embedding, z)
        if done < self.depth:
            with live_rows.using(routing.live(len(self.blocks))):
                z = tower.run_blocks(z, done, self.depth)
        return routing.merge(tower.finish(z))

    def _static(self, tower: TowerParts, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every image exits: nothing is decided, and no block follows."""
        block, capacity = self.blocks[0], len(z)
        with live_rows.using(LiveRows(self.images, capacity)):
            z = tower.run_blocks(z, 0, block)
            embedding, _, *features, _ = tower.probe(0, z)
        depth = torch.full((capacity,), block, dtype=torch.int32, device=z.device)
        trace = torch.stack([torch.zeros_like(features[0]), *features], dim=1)
        return embedding.to(z.dtype), depth, trace[:, None]

    def _pass(
        self, e: int, tower: TowerParts, routing: DeviceRouting, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens at exit e, or where it runs beside the next block after that; and embeddings."""
        probes: list[Probe] = []

        def decide() -> None:
            probes.append(tower.probe(e, z))
            routing.decide(e, probes[0])

        if self.beside is None:
            decide()
            return z, probes[0][0]
        join = self.beside(decide)
        block = self.blocks[e]
        after = tower.run_blocks(z, block, block + 1)
        join()  # z is held until here: the probe reads it on another stream
        return after, probes[0][0]


def decides_on_device(tower: nn.Module, x: Tensor) -> bool:
    """Whether a call of an accelerated tower on these images decides its exits on the device."""
    is_for_graphs = getattr(tower, "_is_for_graphs", None)
    return is_for_graphs is not None and bool(is_for_graphs(x))


class Tower(TowerParts, Protocol):
    """A tower whose images may exit."""

    tower_spec: TowerSpec
    segments: Segments


def run_on_device(
    tower: Tower, router: Router, x: Tensor, graphs: Graphs, by_router: Callable[[], Tensor]
) -> Tensor:
    """Images [B, …] -> embeddings [B, E]. The host waits for nothing, but for what a trace records.

    The first call of a bucket is run by the eager router too, whose result is returned, and the
    bits are compared: where they differ, one line of the log says so and the router stays.

    Args:
      router: of the tower, one exit at least.
      x: 1 to cuda_graphs.BUCKETS[-1] images.
      graphs: of the tower, inside their with statement.
      by_router: the same call, decided on the host.
    """
    bucket, kind = bucket_of(len(x)), router.gate.kind
    key = "exits", kind, always_exits(router.gate), router.logit_scale, bucket, x.dtype, x.shape[1:]
    if graphs.checks.get(key) is False:
        return by_router()
    if key in graphs.checks:
        return _by_graph(tower, router, x, graphs)
    expected = by_router()
    with not_recording():
        actual = _by_graph(tower, router, x, graphs)
    is_same = bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())
    graphs.checks[key] = is_same
    if not is_same:
        _log.warning(
            "accelerate: exits must have the router's bits on the device, got others at batch %d"
            " (%s gate): they are decided on the host, calls are slower; please report it",
            len(x), kind,
        )  # fmt: skip
    return expected


def _by_graph(tower: Tower, router: Router, x: Tensor, graphs: Graphs) -> Tensor:
    """See run_on_device; traced calls wait for their record."""
    B, blocks, depth = len(x), router.blocks, tower.segments.whole.last
    # Other heads than these launch products, which share memory with those of the block
    is_probe = all(isinstance(head, Int8Head) for head in router.heads)
    is_fixed = always_exits(router.gate)
    is_late = is_probe and not is_fixed and is_beside(bucket_of(B), tower.tower_spec.tokens)
    numbers = graphs.constant("gate", gate_numbers(router.gate), torch.float32)
    whole = DeviceExits(
        router.gate, blocks, depth, router.classes.shape[1],
        images=graphs.constant("images", (B,), torch.int32),
        numbers=numbers.view(len(blocks), 4),
        beside=graphs.beside if is_late else None,
    )  # fmt: skip
    name = "exits", router.gate.kind, is_fixed, router.logit_scale
    result, exit_depth, trace = graphs.run(name, partial(whole.run, tower), x)
    record = router.new_record(B, depth)
    if record is not None:
        record.note_device(exit_depth.cpu(), trace.cpu(), blocks, is_late=is_late)
    return result.clone()
