"""full_depth and trace: a model with early exits without them, and what its exits did."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lraee.exits.record import Record, recording, switched_off
from lraee.exits.router import Router
from lraee.towers.families import find_tower
from lraee.towers.flops import PartFlops, probe_flops
from lraee.towers.runner import exits_of


def has_exits(model: nn.Module) -> bool:
    """Whether images may leave this model's tower early; False where it cannot have exits."""
    try:
        return exits_of(find_tower(model)) is not None
    except (TypeError, NotImplementedError):
        return False


@contextmanager
def full_depth(model: nn.Module) -> Iterator[None]:
    """Lets this thread's calls of an accelerated model run to full depth: plain int8, bit for bit.

        with lraee.full_depth(fast):
            fast.encode_image(batch)

    A model without exits runs as always. Other threads are not affected.
    """
    router = exits_of(find_tower(model))
    if router is None:
        yield
        return
    with switched_off(router):
        yield


@dataclass(frozen=True)
class ExitStats:
    """What early exits did to a number of images.

    Args:
      images: how many.
      share: per exit, and last at full depth, the share of images that left there.
      full_flops: what they cost at full depth, without heads and probes.
      expected_flops: what they cost if each image runs to its exit and no further, heads and
        probes counted.
      run_flops: what the blocks, probes and projection really ran on; more than expected only
        where a batch carried images that had left (see Compaction).
    """

    images: int
    share: tuple[float, ...]
    full_flops: int
    expected_flops: int
    run_flops: int

    @property
    def flops_saved(self) -> float:
        """1 - run_flops / full_flops; 0 without images."""
        return 1.0 - self.run_flops / self.full_flops if self.images else 0.0

    def __add__(self, other: "ExitStats") -> "ExitStats":
        """Both sets of images, through the same exits."""
        images = self.images + other.images
        pairs = zip(self.share, other.share, strict=True)
        return ExitStats(
            images=images,
            share=tuple((a * self.images + b * other.images) / max(images, 1) for a, b in pairs),
            full_flops=self.full_flops + other.full_flops,
            expected_flops=self.expected_flops + other.expected_flops,
            run_flops=self.run_flops + other.run_flops,
        )


class Trace:
    """Every image that one thread ran through a model with exits, in the order of the calls.

    Args:
      tower: the accelerated image tower.
      router: its exits.
      records: one per call, as they come.
    """

    def __init__(self, tower: nn.Module, router: Router, records: list[Record]) -> None:
        """See the class."""
        self._parts = PartFlops.as_run(tower)
        self._probes = probe_flops(router)
        self._exits = router.blocks
        self._records = records

    @property
    def exit_block(self) -> Tensor:
        """After how many blocks each image left, int64 [n]; the number of blocks at full depth."""
        depths = [depth for record in self._records for depth in record.exit_block]
        return torch.tensor(depths, dtype=torch.int64)

    @property
    def scores(self) -> Tensor:
        """Gate scores float32 [n, m] at the m exits; NaN where an image did not come."""
        empty = torch.empty(0, len(self._exits))
        return torch.cat([empty, *(record.scores() for record in self._records)])

    @property
    def features(self) -> Tensor:
        """Confidence, margin and variance float32 [n, m, 3]; NaN where an image did not come."""
        empty = torch.empty(0, len(self._exits), 3)
        return torch.cat([empty, *(record.features() for record in self._records)])

    @property
    def flops_saved(self) -> float:
        """Share of the full-depth tower's FLOPs that was saved, heads and probes charged."""
        return self.stats.flops_saved

    @property
    def stats(self) -> ExitStats:
        """Shares and FLOPs of all images so far."""
        exit_block = self.exit_block
        images, depths = len(exit_block), (*self._exits, len(self._parts.blocks))
        counts = [int((exit_block == depth).sum()) for depth in depths]
        costs = self._parts.when_leaving(self._exits, self._probes)
        return ExitStats(
            images=images,
            share=tuple(count / max(images, 1) for count in counts),
            full_flops=images * self._parts.total,
            expected_flops=sum(n * cost for n, cost in zip(counts, costs, strict=True))
            - self._skipped_probes(),
            run_flops=sum(map(self._run_flops, self._records)),
        )

    def _skipped_probes(self) -> int:
        """Probe FLOPs that calls inside full_depth did not pay."""
        whole = [r for r in self._records if not any(r.probe_rows)]
        return sum(self._probes) * sum(len(record.exit_block) for record in whole)

    def _run_flops(self, record: Record) -> int:
        parts = self._parts
        blocks = zip(record.block_rows, parts.blocks, strict=True)
        probes = zip(record.probe_rows, self._probes, strict=True)
        return (
            parts.embed * len(record.exit_block)
            + sum(rows * flops for rows, flops in (*blocks, *probes))
            + parts.finish * record.finish_rows
        )


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Records where each image leaves, with the scores of the gate.

        with lraee.trace(fast) as t:
            fast.encode_image(batch)
        t.exit_block, t.scores, t.features, t.flops_saved, t.stats

    Calls of other threads are not seen.

    Raises: ValueError on a model without exits.
    """
    tower = find_tower(model)
    router = exits_of(tower)
    if router is None:
        raise ValueError("trace: model must have exits, got none; accelerate(model, exits=…)")
    with recording(router) as records:
        yield Trace(tower, router, records)
