"""Executors: how the segments of a tower are run, as they stand or as CUDA graphs."""

from functools import partial
from typing import Protocol

from torch import Tensor

from lraee.towers.cuda_graphs import Graphs
from lraee.towers.segments import Segment, TowerParts


class Executor(Protocol):
    """Runs one segment after the other."""

    @property
    def is_static(self) -> bool:
        """Whether results are overwritten when a segment runs again."""

    def run(self, segment: Segment, z: Tensor) -> tuple[Tensor, ...]:
        """The results of Segment.run on [R, …]."""


class EagerExecutor:
    """Segments as they stand.

    Args:
      tower: whose segments are run.
    """

    is_static = False

    def __init__(self, tower: TowerParts) -> None:
        """See the class."""
        self._tower = tower

    def run(self, segment: Segment, z: Tensor) -> tuple[Tensor, ...]:
        """See Executor."""
        return segment.run(self._tower, z)


class GraphExecutor:
    """Segments as CUDA graphs, each captured when it first meets a batch of some bucket.

    Args:
      tower: whose segments are run.
      graphs: of the tower, inside their with statement.
      logit_scale: the one number in a segment that is not a tensor of the tower.
    """

    is_static = True

    def __init__(self, tower: TowerParts, graphs: Graphs, logit_scale: float | None) -> None:
        """See the class."""
        self._tower, self._graphs, self._logit_scale = tower, graphs, logit_scale

    def run(self, segment: Segment, z: Tensor) -> tuple[Tensor, ...]:
        """See Executor; 1 to cuda_graphs.BUCKETS[-1] rows."""
        key = segment.name, self._logit_scale
        return self._graphs.run(key, partial(segment.run, self._tower), z)
