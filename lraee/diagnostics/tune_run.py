"""One run of `lraee tune`: linears, then the whole tower, then the tables of the user's cache."""

from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lraee.diagnostics import selftest, tower_times, tuning
from lraee.diagnostics.interpreter import Device
from lraee.diagnostics.selftest import describe
from lraee.diagnostics.selftest_sizes import Target
from lraee.diagnostics.tuned_layers import tuned_tower
from lraee.diagnostics.tuning import Effort, Rounds, Tuned
from lraee.kernels import configs, user_cache
from lraee.kernels import tuned as tuned_table
from lraee.measurement import float16, machine
from lraee.measurement.float16 import TowerTime
from lraee.towers.families import find_tower

SCHEMA = "lraee.tune/1"
LINEARS_SHARE = 0.8
"""Of the budget, where the tower is timed as well."""


def find_target(device: Device) -> Target:
    """This GPU, or the interpreter with an A100's configs.

    Raises: NotImplementedError with the reason where the kernels cannot run.
    """
    is_there = device == "cuda" and torch.cuda.is_available()
    return selftest.find_target(
        device, command="tune", advice="; --device interpreter runs every step without",
        index=torch.cuda.current_device() if is_there else 0,
    )  # fmt: skip


@dataclass(frozen=True)
class TuneResult:
    """What was measured; `stored` is the table that was written, None in the interpreter."""

    gpu: str
    key: str
    tuned: tuple[Tuned, ...]
    towers: tuple[TowerTime, ...]
    stored: Path | None

    def lines(self) -> list[str]:
        """One line a shape: the fastest config beside what ran before."""
        return [_shape_line(one) for one in self.tuned]

    def tower_lines(self) -> list[str]:
        """One line a batch, and where float16 is faster."""
        rows = [
            f"batch {row.batch}: int8 {row.int8_ms:.3f} ms, float16 {row.float16_ms:.3f} ms"
            f" ({row.float16_ms / row.int8_ms:.2f}x)"
            for row in self.towers
        ]
        if any(row.is_float_faster for row in self.towers):
            rows.append("float16 is faster where the factor is below 1")
        return rows

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "schema": SCHEMA, **machine.describe(), "gpu": self.gpu, "tower": self.key,
            "kernels": user_cache.kernels_hash(),
            "shapes": [tuning.as_record(one) for one in self.tuned],
            "towers": [asdict(row) for row in self.towers],
        }  # fmt: skip


def _shape_line(one: Tuned) -> str:
    layer, best, pick = one.layer, one.best, one.pick
    assert best.timing is not None and pick.timing is not None
    text = (
        f"M={one.M} N={layer.N} K={layer.K} {layer.epilogue.name}: {best.family} {best.config}"
        f" {1e3 * best.timing.median_ms:.1f} us"
    )
    if one.is_faster:
        text += f", before {1e3 * pick.timing.median_ms:.1f} us"
    wrong = sum(each.error is not None for each in one.tried)
    return f"{text}; {wrong} of {len(one.tried)} refused" if wrong else text


def run(
    model: nn.Module,
    target: Target,
    *,
    has_tower: bool = True,
    budget_s: float = 600.0,
    progress: bool = True,
    rounds: Rounds | None = None,
    effort: Effort | None = None,
) -> TuneResult:
    """Times the linears and, with has_tower, the tower; on a GPU the tables are stored.

    Args:
      model: float, with an image tower.
      target: from find_target.
      has_tower: time the whole tower beside float16 too.
      budget_s: seconds for all of it.
      progress: show a progress bar.
      rounds, effort: how calls are timed and how much is tried; by the target where None.
    Raises: OSError where the cache cannot be written.
    """
    is_gpu = target.device.type == "cuda"
    effort = effort or (tuning.FULL if is_gpu else tuning.TINY)
    rounds = rounds or tuning.rounds_on(target, effort.rounds_s)
    tower = find_tower(model)
    sizes = tuned_tower(tower)
    share = LINEARS_SHARE if has_tower else 1.0
    with torch.inference_mode():
        shapes = tuning.tune(
            sizes.layers, sizes.L if is_gpu else 1, target, rounds, effort=effort,
            budget_s=share * budget_s,
        )  # fmt: skip
        total = len(sizes.layers) * len(effort.batches)
        tuned = tuple(tqdm(shapes, "linears", total=total, disable=not progress))
    gpu = str(describe(target)["gpu"])
    stored = _store_tilings(gpu, tuned) if is_gpu else None
    towers: tuple[TowerTime, ...] = ()
    for cached in (tuned_table.table, configs.pick):
        cached.cache_clear()
    if has_tower:  # with the table that was just stored
        timing = tower_times.time_tower(
            tower, target, rounds, effort.batches, budget_s=(1 - share) * budget_s
        )
        towers = tuple(tqdm(timing, "tower", disable=not progress))
    if is_gpu and towers:
        float16.store(gpu, sizes.key, list(towers), str(date.today()))
    return TuneResult(gpu, sizes.key, tuned, towers, stored)


def _store_tilings(gpu: str, tuned: tuple[Tuned, ...]) -> Path:
    """Writes the table; rows of other shapes of this GPU and Triton stay."""
    rows = tuning.table_rows(tuned)
    header = {"gpu": gpu, "triton": metadata.version("triton")}
    before = user_cache.read(tuned_table.NAME) or {}
    shapes = {_shape_of(row) for row in rows}
    if {name: before.get(name) for name in header} == header and isinstance(
        before.get("rows"), list
    ):
        rows = [
            row for row in before["rows"] if isinstance(row, dict) and _shape_of(row) not in shapes
        ] + rows
    path: Path = user_cache.write(
        tuned_table.NAME, {**header, "date": str(date.today()), "rows": rows}
    )
    return path


def _shape_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return str(row.get("N")), str(row.get("K")), str(row.get("epilogue"))
