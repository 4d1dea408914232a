"""How many images of a batch are still in the tower, read on the device by every launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LiveRows:
    """The first `images` of `capacity` images; rows of the others are neither read nor written.

    images: int32 [1] on the device of the launches.
    capacity: images that tensors have room for.
    """

    images: Tensor
    capacity: int

    def rows_per_image(self, rows: int) -> int:
        """Rows of one image in a tensor of that many rows.

        Raises: ValueError where rows are not a multiple of the capacity.
        """
        if rows % self.capacity:
            raise ValueError(
                f"live_rows: rows must be a multiple of the {self.capacity} images of the batch,"
                f" got {rows}"
            )
        return rows // self.capacity


_live: ContextVar[LiveRows | None] = ContextVar("live_rows", default=None)


@contextmanager
def using(live: LiveRows) -> Iterator[None]:
    """Inside, launches of this thread skip the rows of images beyond live.images.

    Kernels load live.images themselves, so that a captured graph follows what an exit before them
    wrote there, without a wait of the host.
    """
    token = _live.set(live)
    try:
        yield
    finally:
        _live.reset(token)


def current() -> LiveRows | None:
    """The live rows of this thread's launches; None where all rows are."""
    return _live.get()


def operands(rows: int, absent: Tensor) -> tuple[Tensor, int, bool]:
    """What a launch on that many rows, or images, is given: live_ptr, rows_per_image, HAS_LIVE.

    Args:
      absent: stands for the pointer where all rows are live; it is then not read.
    """
    live = current()
    return (absent, 0, False) if live is None else (live.images, live.rows_per_image(rows), True)
