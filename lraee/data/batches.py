"""Photos as calibration sees them: preprocessed batches that can be iterated again."""

from collections.abc import Callable, Iterator

import torch
from PIL.Image import Image
from torch import Tensor

from lraee.data.photos import Photos
from lraee.storage import spill

_IN_MEMORY_BYTES = 256 << 20
_KEPT_BYTES = 8 << 30


class PhotoImages:
    """Preprocessed batches of photos, the same ones in the same order each time.

    All are decoded once at the start, which tells bad files and labels; they are kept, the first
    256 MiB in memory and what follows on disk, and decoded anew in each pass beyond 8 GiB.

    Args:
      photos: a folder or ZIP.
      preprocess: photo -> float32 [3, H, W].
      batch: photos per batch.
      progress: show a bar for the first pass.
    """

    def __init__(
        self,
        photos: Photos,
        preprocess: Callable[[Image], Tensor],
        *,
        batch: int = 64,
        progress: bool = True,
    ) -> None:
        """See the class."""
        self._photos, self._preprocess, self._batch = photos, preprocess, batch
        self._kept: list[Tensor] | None = []
        self.names: list[str] = []
        labels: list[int | None] = []
        kept_bytes = 0
        for each in photos.batches(preprocess, size=batch, progress=progress):
            self.names += each.names
            labels += each.labels
            kept_bytes += each.images.nbytes
            if kept_bytes > _KEPT_BYTES:
                self._kept = None
            if self._kept is not None:
                limit = None if kept_bytes <= _IN_MEMORY_BYTES else 0
                kept = spill.empty(
                    *each.images.shape, dtype=each.images.dtype, in_memory_bytes=limit
                )
                self._kept.append(kept.copy_(each.images))
        known = [-1 if label is None else label for label in labels]
        self.labels = torch.tensor(known, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches of a pass."""
        return -(-len(self.names) // self._batch)

    def __iter__(self) -> Iterator[Tensor]:
        """Images float32 [B, 3, H, W]."""
        if self._kept is not None:
            yield from self._kept
            return
        again = self._photos.only(self.names)
        for each in again.batches(self._preprocess, size=self._batch, progress=False):
            yield each.images
