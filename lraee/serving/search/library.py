"""Photos and their embeddings, as `lraee embed` writes them: rows are known by number alone."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lraee.data.names import from_stored, printable, to_bytes
from lraee.data.sources import DataError, Limits, first_line
from lraee.serving.search.index import Exact, Hits, Quantized, make_index
from lraee.serving.search.reader import open_reader

_COLUMNS = ("path", "embedding", "width", "height")


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings.

    Args:
      names: of the photos, below `source`.
      rows: unit rows float32 [N, E]; a row that is not finite is never a hit.
      sizes: width and height int32 [N, 2], 0 where unknown.
      model: title of the model that made the rows.
      weights: hash of its image tower, or "".
      folder: where the file lies.
      photos_from: folder or archive that the names begin in, as `lraee embed` noted it, or None.
    """

    names: Sequence[str]
    rows: NDArray[np.float32]
    sizes: NDArray[np.int32]
    model: str
    weights: str
    folder: Path
    photos_from: Path | None = None


def read_embeddings(path: Path) -> Embeddings:
    """Read what `lraee embed` wrote: a file, or a folder of parts.

    Raises: DataError, one line, on anything else; ImportError without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "search: photos need pyarrow, which is not installed: pip install 'lraee[embed]'"
        ) from error
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    try:
        tables = [parquet.read_table(file, columns=list(_COLUMNS)) for file in files]
        table = pyarrow.concat_tables(tables)
        rows = _matrix(table["embedding"].combine_chunks())
        sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1)
        names = [from_stored(name) for name in table["path"].to_pylist()]
        about = _about(tables[0].schema.metadata or {})
        origins = {_photos_from(each.schema.metadata or {}) for each in tables}
    except (
        OSError,
        pyarrow.ArrowException,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise DataError(
            f"search: {path} must be what `lraee embed` wrote of photos: {first_line(error)}"
        ) from error
    with np.errstate(invalid="ignore", divide="ignore"):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model, weights = (str(about.get(key, "")) for key in ("model", "weights"))
    folder = path.parent.absolute()
    return Embeddings(
        names, rows, np.nan_to_num(sizes).astype(np.int32), model, weights, folder,
        origins.pop() if len(origins) == 1 else None,
    )  # fmt: skip


def _matrix(column: Any) -> NDArray[np.float32]:
    """Lists of one length to float32 [N, E], a copy."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    count = len(column)
    if not count:
        return np.empty((0, column.type.list_size), np.float32)
    if column.null_count or len(flat) % count:
        raise ValueError("every embedding must have the same length")
    lengths = {len(column[0]), len(column[count - 1]), len(flat) // count}
    if len(lengths) != 1 or not lengths.pop():
        raise ValueError("every embedding must have the same length")
    rows: NDArray[np.float32] = np.array(flat, dtype=np.float32).reshape(count, -1)
    return rows


def _common_folder(names: Sequence[str]) -> int:
    """Length of the folder that all of these paths begin with; 0 where one is not absolute."""
    if not names or not all(name.startswith("/") for name in names):
        return 0
    return len(os.path.commonpath([os.path.dirname(name) for name in names]).rstrip("/")) + 1


def _about(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    about = json.loads(metadata.get(b"lraee", b"{}"))
    if not isinstance(about, dict):
        raise ValueError("the metadata must be an object")
    return about


def _photos_from(metadata: dict[bytes, bytes]) -> Path | None:
    path = metadata.get(b"lraee.photos_from")
    if path is None:
        return None
    decoded = to_bytes(from_stored(path.decode()))
    if not os.path.isabs(decoded) or b"\0" in decoded:
        raise ValueError("lraee.photos_from must be an absolute path")
    return Path(os.fsdecode(decoded))


class Library:
    """Embedded photos that can be searched and read by row; nothing else of the disk can be.

    Args:
      embeddings: names and rows.
      source: folder or archive that the names begin in; None: that of the embeddings. Where they
        have none, names are absolute paths, or begin in the folder of the embeddings.
      limits: on the size of a photo.
    Raises: DataError where there is no such folder or archive.
    """

    def __init__(
        self, embeddings: Embeddings, source: Path | None = None, limits: Limits | None = None
    ) -> None:
        """See the class."""
        self.embeddings = embeddings
        self.index: Exact | Quantized = make_index(embeddings.rows)
        self._hidden = _common_folder(embeddings.names)
        place = source or embeddings.photos_from
        if source is None and place is not None and not place.exists():
            raise DataError(
                f"search: {printable(str(place))}, which the embeddings name as the place of their"
                " photos, must exist; give --photos-from FOLDER"
            )
        self._read = open_reader(place, embeddings.folder, limits or Limits())

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.embeddings.names)

    def require_photos(self) -> None:
        """Raises DataError where none of eight photos, spread evenly, can be read."""
        step = max(1, len(self) // 8)
        for row in range(0, len(self), step):
            try:
                self.read(row)
                return
            except DataError as error:
                reason = f"{printable(self.title(row))} {error}"
        if len(self):
            raise DataError(
                "search: photos must lie where the embeddings name them, got none"
                f" ({reason}); give --photos-from FOLDER"
            )

    def title(self, row: int) -> str:
        """What clients see of a name: without the folders that all absolute names begin with."""
        name = self.embeddings.names[row][self._hidden :]
        return name.encode("utf-8", "replace").decode("utf-8")

    def search(self, query: NDArray[np.float32], k: int) -> Hits:
        """The k rows nearest to a unit query [E]."""
        return self.index.search(query, k)

    def similar(self, row: int, k: int) -> Hits:
        """The k rows nearest to another, which is not among them."""
        hits = self.index.search(self.embeddings.rows[row], k + 1)
        keep = hits.rows != row
        return Hits(hits.rows[keep][:k], hits.scores[keep][:k])

    def read(self, row: int) -> bytes:
        """Bytes of one photo. Raises: DataError where its file is missing, unsafe or too large."""
        return self._read(self.embeddings.names[row])
