"""Embeddings of many photos or texts: a decode pool beside the tower, parts on disk, resumable.

    listing -> parts of equal length -> decode pool (threads) -> batches -> tower -> part-N.parquet

A part is a run of candidates of the listing, so a run that was cut off and went on writes the same
files as one that was not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lraee.data.names import to_bytes
from lraee.data.sources import READ_ERRORS, DataError, Skipped, first_line
from lraee.measurement.machine import threads_here
from lraee.serving.account import Totals, account
from lraee.serving.listing import Candidate, Listing
from lraee.serving.output import Finished, Output
from lraee.serving.parts import Part, PartHeader, Provenance, Row, Settings, write_part
from lraee.serving.pool import ordered

PART_ROWS = 1024


@dataclass(frozen=True)
class Prepared:
    """What the tower takes of one photo (pixels) or text (the text), and the photo's size."""

    data: Any
    width: int = 0
    height: int = 0


class Encoder(Protocol):
    """A model with what feeds it."""

    @property
    def settings(self) -> Settings:
        """All that the embeddings depend on."""

    def prepare(self, data: bytes) -> Prepared:
        """Called in the pool's threads; raises DataError on what cannot be used."""

    def encode(self, rows: Sequence[Prepared]) -> tuple[np.ndarray, Sequence[int | None]]:
        """Embeddings float32 [n, E] and exit blocks; called in one thread."""


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the candidates, by a hash of their names; `index` from 1 on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "2/8"; raises ValueError, one line."""
        index, slash, count = text.partition("/")
        is_number = index.isdecimal() and count.isdecimal() and slash == "/"
        if not is_number or not 1 <= int(index) <= int(count):
            raise ValueError(f"embed: --shard must be i/n with 1 <= i <= n, got {text!r}")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, candidate: Candidate) -> bool:
        """Whether the candidate is in this share, in every listing that holds it."""
        digest = blake2b(to_bytes(candidate.name), digest_size=8).digest()
        return int.from_bytes(digest) % self.count == self.index - 1


def run(
    listing: Listing,
    encoder: Encoder,
    output: Output,
    *,
    shard: Shard | None = None,
    batch: int = 32,
    workers: int = 0,
    part_rows: int = PART_ROWS,
    progress: bool = True,
) -> Totals:
    """Embed all that a listing holds and an output does not.

    Args:
      listing: what to embed.
      encoder: by which model.
      output: entered; where to.
      shard: which share of it; None for all.
      batch: rows per call of the tower.
      workers: decode threads; 0: one per CPU.
      part_rows: candidates per part.
      progress: show a bar.
    Raises: DataError, one line, where the output was made with other settings or nothing is there.
    """
    workers = workers or threads_here()
    settings = {**encoder.settings, "shard": None if shard is None else str(shard)}
    provenance = Provenance(settings, listing.photos_from)
    finished = Finished(output, provenance)
    parts = split(_kept(listing, shard), part_rows)
    jobs = ordered(
        _jobs(parts, finished), _Preparer(listing, encoder),
        workers=workers, window=2 * max(batch, workers),
    )  # fmt: skip
    with (
        account(output, finished, provenance, may_be_empty=shard is not None) as counts,
        _Bar(listing, shard, progress) as bar,
    ):
        work = _Work(encoder, output, provenance, batch, bar)
        for job in jobs:
            if job.candidate is not None:
                work.add(job)
                continue
            header = job.header or work.finish(job.part)
            counts.add(job.part, header, resumed=header.rows if job.header else work.copied)
            if job.header:
                bar.resume(len(job.part.candidates))
    return counts.totals


def split(rows: Iterable[Candidate | Skipped], part_rows: int) -> Iterator[Part]:
    """Parts of `part_rows` candidates, the last one shorter; none without any row."""
    part = Part(0)
    for row in rows:
        if isinstance(row, Skipped):
            part.skipped.append(row)
            continue
        part.candidates.append(row)
        if len(part.candidates) == part_rows:
            yield part
            part = Part(part.index + 1)
    if part.candidates or part.skipped:
        yield part


@dataclass(frozen=True)
class _Job:
    """A candidate of a part, and what became of it; without one, the end of the part.

    `header` is there where the part is kept as it lies.
    """

    part: Part
    candidate: Candidate | None = None
    result: Prepared | Row | Skipped | None = None
    header: PartHeader | None = None


def _jobs(parts: Iterable[Part], finished: Finished) -> Iterator[_Job]:
    for part in parts:
        header = finished.keep(part) if part.candidates else PartHeader("", 0)
        if header is None:
            for candidate in part.candidates:
                yield _Job(part, candidate, finished.row(candidate))
        yield _Job(part, header=header)


@dataclass(frozen=True)
class _Preparer:
    """Reads and decodes, in the pool's threads."""

    listing: Listing
    encoder: Encoder

    def __call__(self, job: _Job) -> _Job:
        if job.candidate is None or job.result is not None:
            return job
        return _Job(job.part, job.candidate, prepare(self.listing, self.encoder, job.candidate))


def prepare(listing: Listing, encoder: Encoder, candidate: Candidate) -> Prepared | Skipped:
    """What the tower takes of one candidate, or why it takes none."""
    try:
        data = listing.read(candidate)
    except DataError as error:
        return Skipped(candidate.name, str(error))
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        return Skipped(candidate.name, f"cannot be read: {reason}")
    except ValueError as error:  # a path with a NUL
        return Skipped(candidate.name, f"cannot be read: {first_line(error)}")
    try:
        return encoder.prepare(data)
    except DataError as error:
        return Skipped(candidate.name, str(error))


class _Work:
    """The part at hand: batches through the tower, rows in the order of the candidates."""

    def __init__(
        self, encoder: Encoder, output: Output, provenance: Provenance, batch: int, bar: "_Bar"
    ) -> None:
        self._encoder, self._output, self._provenance = encoder, output, provenance
        self._batch, self._bar = batch, bar
        self._results: list[Row | Skipped | None] = []
        self._waiting: list[tuple[int, Candidate, Prepared]] = []
        self.copied = 0

    def add(self, job: _Job) -> None:
        assert job.candidate is not None
        if self._results == []:
            self.copied = 0
        if isinstance(job.result, Prepared):
            self._waiting.append((len(self._results), job.candidate, job.result))
            self._results.append(None)
            if len(self._waiting) == self._batch:
                self._encode()
            return
        self.copied += isinstance(job.result, Row)
        self._results.append(job.result)
        self._bar.update(1)

    def finish(self, part: Part) -> PartHeader:
        """Write the part."""
        self._encode()
        rows = [result for result in self._results if isinstance(result, Row)]
        failures = [result for result in self._results if isinstance(result, Skipped)]
        self._results = []
        path = self._output.part(part.index)
        return write_part(path, part, rows, failures, self._provenance)

    def _encode(self) -> None:
        if not self._waiting:
            return
        embeddings, exit_blocks = self._encoder.encode([row for _, _, row in self._waiting])
        for (i, candidate, prepared), embedding, block in zip(
            self._waiting, embeddings, exit_blocks, strict=True
        ):
            self._results[i] = row_of(candidate, prepared, embedding, block)
        self._bar.update(len(self._waiting))
        self._waiting = []


def row_of(
    candidate: Candidate, prepared: Prepared, embedding: np.ndarray, exit_block: int | None
) -> Row | Skipped:
    """The row of an embedding, which must be finite."""
    if not np.isfinite(embedding).all():
        return Skipped(candidate.name, "has an embedding that is not finite")
    return Row(candidate, embedding, prepared.width, prepared.height, exit_block)


def _kept(listing: Listing, shard: Shard | None) -> Iterator[Candidate | Skipped]:
    for row in listing:
        if isinstance(row, Skipped):
            # Each skip is reported once: by the first shard
            if shard is None or shard.index == 1:
                yield row
        elif shard is None or shard.holds(row):
            yield row


class _Bar(tqdm):  # type: ignore[misc]
    """Rows per second and time left; what earlier runs did counts for neither."""

    def __init__(self, listing: Listing, shard: Shard | None, progress: bool) -> None:
        total = listing.count() if progress else None
        if total is not None and shard is not None:
            total //= shard.count
        super().__init__(
            total=total, desc="embed", unit=" images", smoothing=0, disable=not progress
        )

    def resume(self, count: int) -> None:
        """So many are there already."""
        if not self.disable:
            self.initial += count
            self.update(count)
