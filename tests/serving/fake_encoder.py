"""An encoder without a model: embeddings that only the bytes of a file decide, and runs with it."""

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lraee.data.sources import DataError, Limits
from lraee.serving.account import Totals
from lraee.serving.embed import Prepared, run
from lraee.serving.listing import Listing, open_listing
from lraee.serving.output import Output
from lraee.serving.parts import read_about

DIMENSIONS = 8


class FakeEncoder:
    """Bytes that begin with "bad" are no photo, "nan" has no finite embedding."""

    def __init__(self, dtype: str = "float32", **settings: Any) -> None:
        self.settings = {
            "kind": "photos", "dimensions": DIMENSIONS, "dtype": dtype, "model": "fake", **settings,
        }  # fmt: skip
        self.encoded = 0

    def prepare(self, data: bytes) -> Prepared:
        if data.startswith(b"bad"):
            raise DataError(f"is not a whole image: {len(data)} bytes")
        values = np.random.default_rng(list(data)).standard_normal(DIMENSIONS).astype(np.float32)
        return Prepared(values * np.nan if data.startswith(b"nan") else values, len(data), 7)

    def encode(self, rows: Sequence[Prepared]) -> tuple[np.ndarray, Sequence[int | None]]:
        self.encoded += len(rows)
        blocks = [row.width % 12 if row.width % 2 else None for row in rows]
        return np.stack([row.data for row in rows]), blocks


def library(root: Path, count: int = 60) -> Path:
    """Files of random bytes in three folders; some cannot be used, some are no photos."""
    rng = random.Random(0)
    for i in range(count):
        path = root / f"album {i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        beginning = b"bad" if i % 11 == 5 else b"nan" if i % 17 == 9 else b""
        path.write_bytes(beginning + rng.randbytes(rng.randint(1, 40)))
        os.utime(path, ns=(0, 1_700_000_000_123_456_789 + i))
    (root / "album 1" / "notes.txt").touch()
    (root / ".thumbnails").mkdir()
    return root


def embed(
    photos: Path | Listing, out: Path, encoder: FakeEncoder | None = None, **options: Any
) -> Totals:
    """One run, parts of 10 candidates, without a bar."""
    listing = open_listing([str(photos)], Limits()) if isinstance(photos, Path) else photos
    with Output(out) as output:
        return run(
            listing, encoder or FakeEncoder(), output,
            **{"batch": 4, "workers": 2, "part_rows": 10, "progress": False} | options,
        )  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    """Every file that an output shows, byte for byte."""
    if out.suffix == ".parquet":
        return {path.name: path.read_bytes() for path in out.parent.glob(f"{out.stem}*.parquet")}
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


def rows(out: Path) -> pa.Table:
    """All rows of a folder or file."""
    paths = [out] if out.suffix == ".parquet" else sorted(out.glob("part-*.parquet"))
    tables = [pq.read_table(path).replace_schema_metadata() for path in paths]
    return pa.concat_tables(tables)


def folders(out: Path) -> set[str | None]:
    """Where the photos lie, as each file of an output says it."""
    files = out.parent.glob(f"{out.stem}*.parquet") if out.suffix else out.glob("*.parquet")
    return {read_about(path)[1] for path in files}


def failures(out: Path) -> dict[str, str]:
    """Path -> reason."""
    path = out.with_name(f"{out.stem}.failures.parquet") if out.suffix else out / "failures.parquet"
    table = pq.read_table(path)
    return dict(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that dies by SIGKILL at its n-th step on disk or of the model.

    Returns: whether it died; False: it had ended before.
    """
    child = os.fork()
    if child == 0:
        try:
            left = [call]

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def call_of(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call_of

            for name in ("fsync", "replace", "unlink", "rmdir", "open"):
                setattr(os, name, counted(getattr(os, name)))
            FakeEncoder.encode = counted(FakeEncoder.encode)  # type: ignore[method-assign]
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
