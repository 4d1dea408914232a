"""Parquet files of embeddings: their columns, their metadata, and how they are written.

Each file is written beside its place, flushed to disk and renamed: it is there whole or not at all.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lraee.data.names import from_stored, to_bytes, to_stored
from lraee.data.sources import DataError, Skipped, first_line
from lraee.serving.listing import Candidate

if TYPE_CHECKING:
    import pyarrow as pa

_KEY, _PHOTOS_FROM = b"lraee", b"lraee.photos_from"
_FAILURES_AT_ONCE = 4096
_YEARS_US = -62_135_596_800_000_000, 253_402_300_799_000_000
"""Of datetime: the years 1 to 9999."""

Settings = Mapping[str, Any]
"""All that the embeddings depend on, as JSON."""


@dataclass(frozen=True)
class Provenance:
    """What each file of a run says of the whole.

    Args:
      settings: see Settings.
      photos_from: the folder or archive that the names begin in, as an absolute path; None: names
        are texts, or paths by themselves. No embedding depends on it.
    """

    settings: Settings
    photos_from: str | None = None

    def metadata(self, about: Mapping[str, Any]) -> dict[bytes, bytes]:
        """Of a Parquet file: keys `lraee`, JSON, with `about` this file, and `lraee.photos_from`.

        A path stands as a name in a column does: see `to_stored`.
        """
        metadata = {_KEY: json.dumps({**self.settings, **about}, sort_keys=True).encode()}
        if self.photos_from is not None:
            metadata[_PHOTOS_FROM] = to_stored(self.photos_from).encode()
        return metadata


@dataclass(frozen=True)
class Row:
    """One embedding float32 [E]; width and height in pixels; `exit_block` None without exits."""

    candidate: Candidate
    embedding: np.ndarray
    width: int = 0
    height: int = 0
    exit_block: int | None = None


@dataclass(frozen=True)
class PartHeader:
    """What the metadata of a part says.

    Args:
      digest: of the candidates that it stands for, failed ones included, in their order.
      rows: how many were embedded.
      failures: name and reason of each that was not.
    """

    digest: str
    rows: int
    failures: tuple[tuple[str, str], ...] = ()


@dataclass
class Part:
    """A run of candidates, what became of them, and what the listing skipped among them."""

    index: int
    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of names, sizes and times, in order."""
        digest = blake2b(digest_size=16)
        for candidate in self.candidates:
            digest.update(candidate_key(candidate))
        return digest.hexdigest()


def candidate_key(candidate: Candidate) -> bytes:
    """Digest of name, size and time: a photo with another key is embedded again."""
    about = f"\0{candidate.size}\0{candidate.mtime_us}".encode()
    return blake2b(to_bytes(candidate.name) + about, digest_size=16).digest()


def require_pyarrow() -> None:
    """Raises ImportError, one line, where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "embed: Parquet needs pyarrow, which is not installed: pip install 'lraee[embed]'"
        ) from error


def schema(provenance: Provenance, about: Mapping[str, Any]) -> "pa.Schema":
    """Columns of photos or of texts, with the metadata of a file."""
    import pyarrow as pa

    settings = provenance.settings
    number = pa.float16() if settings["dtype"] == "float16" else pa.float32()
    embedding = pa.field("embedding", pa.list_(number, settings["dimensions"]), nullable=False)
    if settings["kind"] == "texts":
        fields = [pa.field("text", pa.string(), nullable=False), embedding]
    else:
        fields = [
            pa.field("path", pa.string(), nullable=False),
            embedding,
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("exit_block", pa.int16()),
        ]
    return pa.schema(fields, metadata=provenance.metadata(about))


def table_of(rows: Sequence[Row], columns: "pa.Schema") -> "pa.Table":
    """The rows as a table."""
    import pyarrow as pa

    kind = columns.field("embedding").type
    dtype = np.float16 if kind.value_type == pa.float16() else np.float32
    flat = np.empty((len(rows), kind.list_size), dtype)
    for i, row in enumerate(rows):
        flat[i] = row.embedding
    values: dict[str, Any] = {
        columns.names[0]: [to_stored(row.candidate.name) for row in rows],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), kind.list_size),
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "size": [row.candidate.size for row in rows],
        "mtime": [_in_range(row.candidate.mtime_us) for row in rows],
        "exit_block": [row.exit_block for row in rows],
    }
    arrays = [pa.array(values[f.name], f.type) for f in columns if f.name != "embedding"]
    arrays.insert(columns.get_field_index("embedding"), values["embedding"])
    return pa.Table.from_arrays(arrays, schema=columns)


def write_part(path: Path, part: Part, rows: Sequence[Row], failures: Sequence[Skipped],
               provenance: Provenance) -> PartHeader:  # fmt: skip
    """One part, whole or not at all."""
    import pyarrow.parquet as pq

    header = PartHeader(part.digest, len(rows), tuple((f.name, f.reason) for f in failures))
    stored = [(to_stored(name), reason) for name, reason in header.failures]
    about = {"part": part.index, "digest": header.digest, "failures": stored}
    with whole_file(path) as temporary:
        pq.write_table(table_of(rows, schema(provenance, about)), temporary)
    return header


def read_metadata(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON in a file's metadata, and its number of rows; DataError where there is none."""
    metadata, _, rows = read_about(path)
    return metadata, rows


def read_about(path: Path) -> tuple[dict[str, Any], str | None, int]:
    """As `read_metadata`, with `photos_from` in between."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        info = pq.read_metadata(path)
        keys = info.metadata or {}
        metadata = json.loads(keys[_KEY])
        photos_from = from_stored(keys[_PHOTOS_FROM].decode()) if _PHOTOS_FROM in keys else None
    except (OSError, pa.ArrowException, KeyError, ValueError, RecursionError) as error:
        raise DataError(
            f"embed: {path} must be a Parquet file of lraee's, got {first_line(error)}"
        ) from error
    if not isinstance(metadata, dict):
        raise DataError(f"embed: {path} must be a Parquet file of lraee's")
    return metadata, photos_from, info.num_rows


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place at the end, on disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """The file or folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FailureFile:
    """`failures.parquet`: path and reason of all that was not embedded, as it comes.

    Memory: 4,096 rows.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [pa.field(name, pa.string(), nullable=False) for name in ("path", "reason")]
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[tuple[str, str]] = []

    def add(self, rows: Iterable[tuple[str, str]]) -> None:
        """More of them: names and reasons."""
        for row in rows:
            self._rows.append(row)
            if len(self._rows) == _FAILURES_AT_ONCE:
                self._write()

    def close(self, provenance: Provenance, about: Mapping[str, Any]) -> None:
        """The end of the file, with its metadata: the output is complete."""
        self._write()
        self._writer.add_key_value_metadata(provenance.metadata(about))
        self._writer.close()

    def abandon(self) -> None:
        """The end of a file that is not kept."""
        self._writer.close()

    def _write(self) -> None:
        import pyarrow as pa

        paths = [to_stored(name) for name, _ in self._rows]
        columns = [pa.array(paths), pa.array([reason for _, reason in self._rows])]
        if self._rows:
            self._writer.write_table(
                pa.Table.from_arrays([c.cast(pa.string()) for c in columns], schema=self._schema)
            )
        self._rows = []


def _in_range(time_us: int) -> int:
    return max(_YEARS_US[0], min(_YEARS_US[1], time_us))
