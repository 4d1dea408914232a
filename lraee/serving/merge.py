"""Shards of one embedding run, joined: every shard there once, of one model, no photo twice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lraee.data.names import from_stored, printable
from lraee.data.sources import DataError
from lraee.serving.account import Totals
from lraee.serving.embed import Shard
from lraee.serving.output import Output, require_same, settings_of
from lraee.serving.parts import (
    FailureFile,
    Provenance,
    read_about,
    read_metadata,
    schema,
    whole_file,
)

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class _Share:
    """One shard: its files of rows, its failures, and what they say of its run."""

    path: Path
    shard: Shard
    files: tuple[Path, ...]
    failures: Path
    settings: dict[str, Any]
    photos_from: str | None


@dataclass
class Merged:
    """What `merge` did; `photos_from`: the folders of the shards where they differ, else empty."""

    totals: Totals
    photos_from: tuple[str, ...] = ()


def merge(paths: Sequence[Path], output: Output) -> Merged:
    """Join finished shards; rows come in the order of the shards.

    Where their photos lie is kept if all shards say the same, and left out otherwise.

    Args:
      paths: outputs of `lraee embed --shard i/n`, all n of them, in any order.
      output: entered; a new folder or file.
    Raises: DataError, one line, on a shard that is missing, there twice, not finished or made with
      other settings, on a photo that is in two of them, and on an output that holds something.
    """
    shares = sorted((_open(path) for path in paths), key=lambda share: share.shard.index)
    _require_all(shares)
    if output.parts() or output.failures.exists() or (output.is_file and output.path.exists()):
        raise DataError(f"merge: --out {printable(str(output.path))} must be new")
    origins = dict.fromkeys(share.photos_from for share in shares)
    provenance = Provenance(
        {**shares[0].settings, "shard": None},
        shares[0].photos_from if len(origins) == 1 else None,
    )
    totals = Totals()
    earlier: set[bytes] = set()
    with output.failure_file() as failures:
        for share in shares:
            for path, table in _tables(share):
                _require_new(table, earlier, path)
                _write(output.part(totals.parts), table, provenance, totals)
            _copy_failures(share, failures, totals)
        failures.close(provenance, totals.about())
    if output.is_file:
        output.join(provenance, totals.about())
    return Merged(totals, tuple(filter(None, origins)) if len(origins) > 1 else ())


def _open(path: Path) -> _Share:
    """A finished shard; raises DataError."""
    source = Output(path)
    last = source.path if source.is_file else source.failures
    if not last.exists() or not source.failures.exists():
        raise DataError(
            f"merge: {printable(str(path))} must be a finished shard, got no {last.name};"
            " run its `lraee embed` again"
        )
    metadata, photos_from, _ = read_about(last)
    settings = settings_of(metadata)
    files = (path,) if source.is_file else tuple(source.parts().values())
    if not source.is_file and len(files) != metadata.get("parts"):
        raise DataError(
            f"merge: {printable(str(path))} must hold {metadata.get('parts')} parts,"
            f" got {len(files)}"
        )
    if not isinstance(shard := settings.pop("shard", None), str):
        raise DataError(f"merge: {printable(str(path))} must be made with --shard, got none")
    return _Share(path, Shard.parse(shard), files, source.failures, settings, photos_from)


def _require_all(shares: Sequence[_Share]) -> None:
    count = shares[0].shard.count
    for share in shares[1:]:
        require_same(shares[0].settings, share.settings, share.path)
    got = [str(share.shard) for share in shares]
    if got != [f"{i}/{count}" for i in range(1, count + 1)]:
        raise DataError(f"merge: shards must be 1/{count} to {count}/{count}, got {', '.join(got)}")


def _tables(share: _Share) -> Iterator[tuple[Path, "pa.Table"]]:
    import pyarrow.parquet as pq

    for path in share.files:
        metadata, _ = read_metadata(path)
        other = settings_of(metadata)
        other.pop("shard", None)
        require_same(share.settings, other, path)
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield path, file.read_row_group(group)


def _require_new(table: "pa.Table", earlier: set[bytes], path: Path) -> None:
    """Raises DataError where a photo was in an earlier table; texts may come twice."""
    if "path" not in table.column_names:
        return
    for name in table["path"].to_pylist():
        digest = blake2b(name.encode(), digest_size=8).digest()
        if digest in earlier:
            raise DataError(
                f"merge: {printable(str(path))} must hold no photo of another shard,"
                f" got {printable(name)}"
            )
        earlier.add(digest)


def _write(path: Path, table: "pa.Table", provenance: Provenance, totals: Totals) -> None:
    import pyarrow.parquet as pq

    # Without a digest `lraee embed` does not take the part for one of its own
    columns = schema(provenance, {"part": totals.parts, "digest": "", "failures": []})
    with whole_file(path) as temporary:
        pq.write_table(table.cast(columns), temporary)
    totals.parts += 1
    totals.embedded += len(table)


def _copy_failures(share: _Share, failures: FailureFile, totals: Totals) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(share.failures) as file:
        for batch in file.iter_batches():
            rows = [(from_stored(row["path"]), row["reason"]) for row in batch.to_pylist()]
            failures.add(rows)
            totals.note(rows)
