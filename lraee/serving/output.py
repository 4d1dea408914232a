"""Where embeddings go: a folder of parts, or one file made of them at the end; and going on there.

DIR/part-00000.parquet ...  DIR/failures.parquet, written last
FILE.parquet                FILE.failures.parquet, and FILE.parquet.parts/ until both are there
"""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lraee.data.names import from_stored, printable
from lraee.data.sources import DataError, first_line
from lraee.serving.listing import Candidate
from lraee.serving.parts import (
    FailureFile,
    Part,
    PartHeader,
    Provenance,
    Row,
    Settings,
    candidate_key,
    flush,
    read_about,
    read_metadata,
    require_pyarrow,
    schema,
    whole_file,
)  # fmt: skip

if TYPE_CHECKING:
    import pyarrow as pa

_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_PER_FILE = ("part", "digest", "failures", "parts", "rows", "failed")
"""Metadata that tells one file of a run from another; all else is settings."""


class Output:
    """One folder or file of embeddings, held by one run at a time.

    Use it as a context; entering refuses what cannot be written.

    Args:
      path: a folder, or a file whose name ends in .parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_file = path.suffix == ".parquet"
        self.folder = path.with_name(path.name + ".parts") if self.is_file else path
        self.failures = (
            path.with_name(f"{path.stem}.failures.parquet")
            if self.is_file
            else path / "failures.parquet"
        )

    def __enter__(self) -> "Output":
        """Raises DataError, one line, where it cannot be written or another run holds it."""
        require_pyarrow()
        shown = printable(str(self.path))
        if self.is_file and self.path.is_dir():
            raise DataError(f"embed: --out must be a file or a new name, got the folder {shown}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", _LOCK_FLAGS, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (self.folder, self.failures.parent):
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except BlockingIOError as error:
            os.close(self._lock)
            raise DataError(f"embed: --out {shown} must have one run at a time") from error
        except OSError as error:
            raise DataError(
                f"embed: --out {shown} must be writable: {first_line(error)}"
            ) from error
        for parent, name in (
            (self.folder, "part-*"),
            (self.failures.parent, glob.escape(self.failures.name)),
            (self.path.parent, glob.escape(self.path.name)),
        ):  # what a killed run was writing
            for left in parent.glob(f".{name}.*.tmp"):
                left.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def part(self, index: int) -> Path:
        """Where a part lies."""
        return self.folder / f"part-{index:05d}.parquet"

    def parts(self) -> dict[int, Path]:
        """The parts that are there, by index."""
        paths = sorted(self.folder.glob("part-*.parquet"))
        return {int(p.stem[5:]): p for p in paths if p.stem[5:].isdecimal()}

    @contextmanager
    def failure_file(self) -> Iterator[FailureFile]:
        """The failures of this run; its `close` must come before the end, else it is not kept."""
        with whole_file(self.failures) as temporary:
            failures = FailureFile(temporary)
            try:
                yield failures
            except BaseException:
                failures.abandon()
                raise

    def join(self, provenance: Provenance, about: dict[str, Any]) -> None:
        """FILE.parquet from the parts, one row group each, which then go."""
        import pyarrow.parquet as pq

        columns = schema(provenance, about)
        with whole_file(self.path) as temporary, pq.ParquetWriter(temporary, columns) as writer:
            for path in self.parts().values():
                writer.write_table(pq.read_table(path).cast(columns))
        shutil.rmtree(self.folder)


class Finished:
    """What earlier runs left in an output: whole parts, and rows of parts that fit no longer.

    Args:
      output: entered.
      provenance: of this run.
    Raises: DataError, one line, where the output was made with other settings.
    """

    def __init__(self, output: Output, provenance: Provenance) -> None:
        self._output = output
        self._old = output.folder / "old"
        self._digests: dict[int, str] = {}
        # Parts of photos that lay elsewhere: their rows are copied, since their metadata is wrong
        self._moved: set[int] = set()
        settings = provenance.settings
        for index, path in output.parts().items():
            metadata, photos_from = _checked(path, settings)
            self._digests[index] = metadata["digest"]
            if photos_from != provenance.photos_from:
                self._moved.add(index)
        whole = [output.path] if output.is_file and output.path.exists() else []
        self._files = [*whole, *sorted(self._old.glob("*.parquet"))]
        for path in self._files:
            _checked(path, settings)
        self._rows: dict[bytes, tuple[int, int, int]] | None = None
        # Rows of texts depend on the texts around them: a text tower is float
        self._can_copy = settings["kind"] == "photos"
        self._group: tuple[tuple[int, int], pa.Table] | None = None

    def keep(self, part: Part) -> PartHeader | None:
        """The part as it lies there, if it stands for these very candidates.

        One that stands for others is retired, with those behind it. One that is missing leaves
        them: Ray writes parts in any order.
        """
        if self._digests.get(part.index) == part.digest and part.index not in self._moved:
            metadata, rows = read_metadata(self._output.part(part.index))
            failures = tuple((from_stored(n), reason) for n, reason in metadata["failures"])
            return PartHeader(part.digest, rows, failures)
        if part.index in self._digests:
            self.retire(part.index)
        return None

    def retire(self, index: int) -> None:
        """Take this part and those behind it out of the output; their rows can still be copied."""
        late = sorted(i for i in self._digests if i >= index)
        for i in late:
            self._old.mkdir(exist_ok=True)
            # The digest keeps the parts of two runs apart
            new = self._old / f"{i:05d}-{self._digests.pop(i)}.parquet"
            os.replace(self._output.part(i), new)
            if new not in self._files:
                self._files.append(new)
        if late:
            flush(self._output.folder)
            self._rows = None

    def row(self, candidate: Candidate) -> Row | None:
        """The row of a candidate that has not changed since, from a part that was retired."""
        if not self._files or not self._can_copy:
            return None
        if self._rows is None:
            self._rows = dict(_keys(self._files))
        place = self._rows.get(candidate_key(candidate))
        return None if place is None else self._read(candidate, place)

    def forget(self) -> None:
        """Delete the retired parts: all is written."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._old)

    def _read(self, candidate: Candidate, place: tuple[int, int, int]) -> Row:
        import pyarrow.parquet as pq

        *group, index = place
        if self._group is None or self._group[0] != (group[0], group[1]):
            with pq.ParquetFile(self._files[group[0]]) as file:
                self._group = (group[0], group[1]), file.read_row_group(group[1])
        row = self._group[1].slice(index, 1)
        embedding = row["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        width, height, exit_block = (
            row[name][0].as_py() for name in ("width", "height", "exit_block")
        )
        return Row(candidate, np.array(embedding), width, height, exit_block)


def settings_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a file's metadata says of the run, without what it says of the file."""
    return {key: value for key, value in metadata.items() if key not in _PER_FILE}


def require_same(settings: Settings, other: Settings, path: Path) -> None:
    """Raises DataError, one line, naming the first setting in which a file differs."""
    expected, got = _flat(settings), _flat(other)
    for key in sorted({*expected, *got}):
        if expected.get(key) != got.get(key):
            raise DataError(
                f"embed: {printable(str(path))} must be made with {key} {expected.get(key)!r:.120},"
                f" got {got.get(key)!r:.120}; choose another --out or the same options"
            )


def _flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted keys, with the types that JSON gives them."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(settings)).items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        flat.update(inner)
    return flat


def _checked(path: Path, settings: Settings) -> tuple[dict[str, Any], str | None]:
    metadata, photos_from, _ = read_about(path)
    require_same(settings, settings_of(metadata), path)
    return metadata, photos_from


def _keys(files: list[Path]) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
    """Each row's key, and its file, row group and place there."""
    import pyarrow.parquet as pq

    for i, path in enumerate(files):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["path", "size", "mtime"])
                times = table["mtime"].cast("int64").to_pylist()
                columns = zip(table["path"].to_pylist(), table["size"].to_pylist(), times,
                              strict=True)  # fmt: skip
                for j, (name, size, time_us) in enumerate(columns):
                    candidate = Candidate(from_stored(name), size, time_us)
                    yield candidate_key(candidate), (i, group, j)
