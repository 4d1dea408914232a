"""Photos from a folder or a ZIP, labels from folder names.

Every file is hostile until checked: sizes before bytes here, the rest in `decoding`. A file that
cannot be used is skipped, kept in `Photos.skipped` with its reason, and reported.
"""

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lraee.data import decoding
from lraee.data.classes import Classes
from lraee.data.names import printable
from lraee.data.sources import READ_ERRORS, DataError, Limits, Skipped, first_line, open_source

_log = logging.getLogger("lraee")


@dataclass(frozen=True)
class Batch:
    """Preprocessed photos: images float32 [n, 3, H, W], labels [n], None where unknown."""

    images: Tensor
    labels: list[int | None]
    names: list[str]


class Photos:
    """The photos of a folder or ZIP, in sorted order.

    Args:
      path: a folder, searched in depth, or a ZIP, never unpacked to disk.
      classes: gives labels: the innermost folder named by a wnid; None leaves every label None.
      limit: keep this many photos, spread evenly over the sorted names.
      only: look at files of these names alone.
      limits: what is refused unread.
    Raises: DataError when the path is neither, holds no photo, or passes a limit as a whole.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: Classes | None = None,
        limit: int | None = None,
        only: Collection[str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.skipped: list[Skipped] = []
        self._limits = limits or Limits()
        self._source = open_source(Path(path), self._limits, self.skipped)
        names = self._source.names()
        if only is not None:
            names = [name for name in names if name in only]
            self.skipped = [row for row in self.skipped if row.name in only]
        if not names:
            raise DataError(f"data: {path} must hold photos, got none ({_summary(self.skipped)})")
        self.names = names if limit is None else _spread(names, limit)
        by_wnid = {wnid: i for i, wnid in enumerate(classes.wnids)} if classes else {}
        self.labels = [_label(name, by_wnid) for name in self.names]

    def only(self, names: Collection[str]) -> "Photos":
        """Return the photos of these names alone, with nothing skipped so far."""
        part = copy.copy(self)
        kept = set(names)
        pairs = zip(self.names, self.labels, strict=True)
        chosen = [(name, label) for name, label in pairs if name in kept]
        part.names, part.labels = [n for n, _ in chosen], [label for _, label in chosen]
        part.skipped = []
        return part

    def __len__(self) -> int:
        """Return how many photos there are, bad ones included until they are read."""
        return len(self.names)

    def read(self, index: int) -> bytes:
        """Return one photo's file; raises DataError with the reason when it cannot be read."""
        try:
            return self._source.read(self.names[index])
        except READ_ERRORS as error:
            raise DataError(f"cannot be read: {first_line(error)}") from error

    def image(self, index: int) -> Image.Image:
        """Return one photo as upright RGB; raises DataError with the reason where it cannot."""
        data = self.read(index)
        return decode(data, decoding.Limits(max_bytes=self._limits.file_size_bytes))

    def batches(
        self,
        preprocess: Callable[[Image.Image], Tensor],
        *,
        size: int = 32,
        progress: bool = True,
        description: str = "photos",
    ) -> Iterator[Batch]:
        """Yield the photos in order, `size` at a time; bad ones are skipped and reported."""
        rows: list[_Row] = []
        before = len(self.skipped)
        for i in tqdm(range(len(self)), desc=description, disable=not progress, leave=False):
            try:
                rows.append((preprocess(self.image(i)), self.labels[i], self.names[i]))
            except DataError as error:
                self.skipped.append(Skipped(self.names[i], str(error)))
            if len(rows) == size:
                yield _stack(rows)
                rows = []
        if rows:
            yield _stack(rows)
        if len(self.skipped) > before:
            _log.warning("data: %s", _summary(self.skipped[before:]))

    def report(self) -> str:
        """Return one line on what was skipped: how many files, and the first few with reasons."""
        return _summary(self.skipped)


def decode(data: bytes, limits: decoding.Limits | None = None) -> Image.Image:
    """Decode one photo to upright RGB, exactly; raises DecodeError with the reason."""
    return Image.fromarray(decoding.decode(data, limits=limits).pixels)


_Row = tuple[Tensor, int | None, str]


def _stack(rows: list[_Row]) -> Batch:
    images, labels, names = zip(*rows, strict=True)
    return Batch(torch.stack(images), list(labels), list(names))


def _label(name: str, by_wnid: dict[str, int]) -> int | None:
    folders = PurePosixPath(name).parts[:-1]
    return next((by_wnid[folder] for folder in reversed(folders) if folder in by_wnid), None)


def _spread(names: list[str], limit: int) -> list[str]:
    if limit < 1:
        raise DataError(f"data: limit must be at least 1, got {limit}")
    count = min(limit, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def _summary(skipped: list[Skipped], shown: int = 3) -> str:
    if not skipped:
        return "nothing skipped"
    first = ", ".join(f"{printable(row.name)} {row.reason}" for row in skipped[:shown])
    more = ", …" if len(skipped) > shown else ""
    return f"skipped {len(skipped)} file{'s' * (len(skipped) > 1)}: {first}{more}"
