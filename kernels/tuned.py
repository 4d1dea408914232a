"""The table that `lraee tune` measured on this GPU of the user; configs.pick reads it first.

{"gpu": name, "triton": version, "rows": [{"N", "K", "most_m", "epilogue", "family",
"config": [block_m, block_n, block_k, num_warps, num_stages, split_k], "us"}, …]}
in the file "tilings" of user_cache. What is no such row is left out, and counted in `reason`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import triton

from lraee.kernels import user_cache

NAME = "tilings"
MOST_ROWS = 4096
LARGEST = 1 << 31
"""No size of a layer, a batch or a tile is larger."""

Numbers = tuple[int, int, int, int, int, int]
LENGTH = 6
FAMILIES = ("simple", "persistent", "gluon")
"""What the field "family" may say."""


@dataclass(frozen=True)
class Row:
    """The fastest tiling of one layer up to most_m rows."""

    N: int
    K: int
    most_m: int
    epilogue: str
    family: str
    config: Numbers


@dataclass(frozen=True)
class Table:
    """Rows that apply, each layer's in ascending order of most_m; why none or not all do."""

    rows: dict[tuple[int, int, str], tuple[Row, ...]]
    reason: str | None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _row(value: Any) -> Row | None:
    """A row of the file, None where it is none."""
    if not isinstance(value, dict):
        return None
    sizes: list[Any] = [value.get(name) for name in ("N", "K", "most_m")]
    fields: list[Any] = [value.get(name) for name in ("epilogue", "family", "us", "config")]
    epilogue, family, us, config = fields
    if not (isinstance(config, list) and len(config) == LENGTH):
        return None
    is_row = (
        all(map(_is_size, [*sizes, *config]))
        and isinstance(epilogue, str)
        and isinstance(family, str)
        and family in FAMILIES
        and type(us) in (int, float)
        and math.isfinite(us)
    )
    N, K, most_m = sizes
    return Row(N, K, most_m, epilogue, family, tuple(config)) if is_row else None


def parse(content: Any, gpu: str) -> Table:
    """The rows of a file that hold on this GPU with this Triton."""
    if content is None:
        return Table({}, "no table of this GPU: lraee tune writes one")
    for name, here in (("gpu", gpu), ("triton", triton.__version__)):
        if content.get(name) != here:
            text = repr(content.get(name))[:60]
            return Table({}, f"the table of tilings is for {name} {text}, here it is {here!r}")
    values = content.get("rows")
    if not isinstance(values, list) or len(values) > MOST_ROWS:
        return Table({}, "the table of tilings has no list of rows that lraee tune wrote")
    rows: dict[tuple[int, int, str], list[Row]] = {}
    is_whole = True
    for row in map(_row, values):
        if row is None:
            is_whole = False
        else:
            rows.setdefault((row.N, row.K, row.epilogue), []).append(row)
    ordered = {key: tuple(sorted(group, key=lambda row: row.most_m)) for key, group in rows.items()}
    return Table(ordered, None if is_whole else "rows that lraee tune did not write are left out")


@functools.cache
def table(gpu: str) -> Table:
    """The table of this GPU, read once in a process; `table.cache_clear` after writing another."""
    return parse(user_cache.read(NAME), gpu)


def row_of(gpu: str, N: int, K: int, M: int, epilogue: str) -> Row | None:
    """The row of this layer for M rows, None where nothing was measured."""
    rows = table(gpu).rows.get((N, K, epilogue), ())
    return next((row for row in rows if M <= row.most_m), None)


def reason(gpu: str) -> str | None:
    """Why the table is not used, or not all of it; None where all of it is."""
    return table(gpu).reason
