"""Whole towers in float16 and int8 on a GPU: what was measured, and where float16 is faster.

Times are milliseconds a call, both replayed as CUDA graphs; a table of the user's own GPU, which
`lraee tune` writes, stands before the one that is here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lraee.kernels import user_cache

NAME = "towers"
"""Of the table in the user's cache."""
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class TowerTime:
    """One tower at one batch."""

    batch: int
    int8_ms: float
    float16_ms: float

    @property
    def is_float_faster(self) -> bool:
        """Whether torch's float16 is."""
        return self.float16_ms < self.int8_ms


@dataclass(frozen=True)
class TowerTimes:
    """What was measured of one tower on one GPU, and when."""

    rows: tuple[TowerTime, ...]
    date: str
    note: str = ""


def _times(int8_ms: tuple[float, ...], float16_ms: tuple[float, ...]) -> TowerTimes:
    rows = zip(BATCHES, int8_ms, float16_ms, strict=True)
    return TowerTimes(tuple(TowerTime(*row) for row in rows), "2026-11-27", "with earlier kernels")


MEASURED: dict[str, dict[str, TowerTimes]] = {
    "NVIDIA H200": {
        "L=50 D=768 blocks=12": _times((0.506, 0.733, 1.250, 3.903), (0.877, 0.992, 1.453, 4.278)),
        "L=197 D=768 blocks=12": _times((0.734, 1.617, 4.767, 18.52), (0.690, 1.120, 3.267, 11.78)),
        "L=257 D=1024 blocks=24": _times((1.710, 4.769, 17.87, 71.2), (1.422, 3.459, 11.66, 45.5)),
    },
}
"""By the GPU's name and the tower's key: python -m bench.gpu_tower at commit a779744, torch 2.11,
Triton 3.6 (docs/gpu.md has the table)."""


def tower_key(L: int, D: int, depth: int) -> str:
    """The name of towers of L tokens of width D in so many blocks."""
    return f"L={L} D={D} blocks={depth}"


def times_of(gpu: str, key: str) -> TowerTimes | None:
    """The user's own times of this tower on this GPU, or those that were measured here."""
    return _own(gpu, key) or MEASURED.get(gpu, {}).get(key)


def tower_keys(gpu: str) -> list[str]:
    """Towers of which there are times on this GPU."""
    return list(MEASURED.get(gpu, {}) | dict(_own_towers(gpu)))


def _own_towers(gpu: str) -> Mapping[str, Any]:
    table = user_cache.read(NAME)
    towers = table.get("towers") if table is not None and table.get("gpu") == gpu else None
    return towers if isinstance(towers, Mapping) else {}


def _own(gpu: str, key: str) -> TowerTimes | None:
    entry = _own_towers(gpu).get(key)
    return _checked(entry) if isinstance(entry, Mapping) else None


def _checked(entry: Mapping[str, Any]) -> TowerTimes | None:
    rows = []
    for row in entry["rows"] if isinstance(entry.get("rows"), list) else ():
        numbers = [row.get(name) if isinstance(row, Mapping) else None
                   for name in ("batch", "int8_ms", "float16_ms")]  # fmt: skip
        batch, int8_ms, float16_ms = numbers
        if isinstance(batch, int) and all(
            isinstance(ms, float) and 0 < ms < 1e6 for ms in (int8_ms, float16_ms)
        ):
            rows.append(TowerTime(batch, float(int8_ms or 0), float(float16_ms or 0)))
    date = entry.get("date")
    return TowerTimes(tuple(rows), date[:10] if isinstance(date, str) else "") if rows else None


def faster_line(gpu: str, key: str) -> str | None:
    """One line where float16 is faster at some batch; None where it is not, or not measured."""
    times = times_of(gpu, key)
    slower = [] if times is None else [row for row in times.rows if row.is_float_faster]
    if times is None or not slower:
        return None
    ratios = sorted(row.int8_ms / row.float16_ms for row in slower)
    span = f"{ratios[0]:.2f}x" + (f" to {ratios[-1]:.2f}x" if len(ratios) > 1 else "")
    batches = ", ".join(str(row.batch) for row in slower)
    when = f"measured {times.date}"
    if times.note:
        when += f" {times.note}; `lraee tune` measures it anew"
    return f"float16 is {span} faster than int8 for this tower on {gpu} at batch {batches} ({when})"


def store(gpu: str, key: str, rows: list[TowerTime], date: str) -> None:
    """Adds the times of one tower to the user's table; those of another GPU are replaced."""
    entry = {"date": date, "rows": [vars(row) for row in rows]}
    user_cache.write(NAME, {"gpu": gpu, "towers": {**_own_towers(gpu), key: entry}})
