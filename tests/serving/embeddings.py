"""Files of embeddings as `lraee embed` writes them, from rows that a test has."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet


def write(
    path: Path, names: Sequence[str], rows: NDArray[np.float32],
    sizes: Sequence[tuple[int, int]] | None = None, photos_from: bytes | None = None,
    **about: object,
) -> Path:  # fmt: skip
    """A parquet with these photos; `about` and `photos_from` are what its metadata says."""
    columns = {
        "path": pa.array(names, pa.string()),
        "embedding": pa.array(list(rows.astype(np.float32)), pa.list_(pa.float32(), rows.shape[1])),
        "width": pa.array([w for w, _ in sizes or [(0, 0)] * len(names)], pa.int32()),
        "height": pa.array([h for _, h in sizes or [(0, 0)] * len(names)], pa.int32()),
    }
    metadata: dict[str | bytes, str | bytes] = {"lraee": json.dumps(about)}
    if photos_from is not None:
        metadata["lraee.photos_from"] = photos_from
    table = pa.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, path)
    return path
