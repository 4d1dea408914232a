"""Tensors that lie in memory while they are small, and else in a file of no name.

The file is removed as soon as it is open, so nothing is left of it when the process ends, however
it ends. Its pages are the system's to write out and to drop: they do not count against memory that
a process must have. The folder is Python's for temporary files; TMPDIR chooses another.
"""

import math
import tempfile

import numpy as np
import torch
from torch import Tensor

IN_MEMORY_BYTES = 64 << 20
"""A tensor of more bytes lies on disk."""


def empty(*shape: int, dtype: torch.dtype, in_memory_bytes: int | None = None) -> Tensor:
    """An uninitialised tensor on the CPU, on disk where it is of more bytes than the limit.

    Args:
      shape: of the tensor.
      dtype: one that NumPy has.
      in_memory_bytes: the limit; None takes IN_MEMORY_BYTES.
    Raises: OSError where the disk is full.
    """
    limit = IN_MEMORY_BYTES if in_memory_bytes is None else in_memory_bytes
    size = math.prod(shape) * dtype.itemsize
    if not size or size <= limit:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(prefix="lraee-") as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


class Rows:
    """Batches of rows [n, …], put into one tensor as they come.

    Args:
      count: rows in all.
    """

    def __init__(self, count: int) -> None:
        """See the class."""
        self._count, self._end = count, 0
        self._rows: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """The next rows, of any device.

        Raises: ValueError on more rows than were to come.
        """
        if self._rows is None:
            self._rows = empty(self._count, *batch.shape[1:], dtype=batch.dtype)
        end = self._end + len(batch)
        if end > self._count:
            raise ValueError(f"Rows: rows must be {self._count}, got {end}")
        self._rows[self._end : end] = batch
        self._end = end

    def result(self) -> Tensor:
        """All rows that came.

        Raises: ValueError where none did.
        """
        if self._rows is None:
            raise ValueError("Rows: rows must be one at least, got none")
        return self._rows[: self._end]
