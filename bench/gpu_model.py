"""PREDICTION of GPU times: an account of each launch, fitted to what one H200 measured.

    python -m bench.gpu_model              all tables
    python -m bench.gpu_model --fit        how well the account reproduces the H200's rows
    python -m bench.gpu_model --markdown   the tower table of docs/gpu.md

Bytes, operations and instructions of a launch are counted (bench.gpu_account); the rates are those
that bench.gpu_parts fitted to 32 measured products and 24 measured towers. Forms: `measured` is
what the H200 ran at commit a779744, with int8 attention; `float` what blocks run now; `persistent`
with persistent products, which no GPU has run. Everything but the H200's `measured` rows is a
prediction, for other GPUs at the rates of their datasheets. Blocks count whole: what the last one
leaves out is 3 to 6 % of the products.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from bench.gpu_account import (
    FLOAT,
    FORMS,
    MEASURED,
    PERSISTENT,
    SEVEN,
    block_costs,
    float16_costs,
    float16_us,
    int8_us,
)
from bench.gpu_parts import GPUS, H200, Gpu
from bench.shapes import B16, B32, L14, Tower
from lraee.measurement import float16

BATCHES = (1, 8, 32, 128)
TOWERS = (B32, B16, L14)


@dataclass(frozen=True)
class FitRow:
    """One measured tower beside the account: milliseconds."""

    tower: Tower
    batch: int
    kind: str
    measured_ms: float
    account_ms: float

    @property
    def ratio(self) -> float:
        """Account over measurement."""
        return self.account_ms / self.measured_ms


def fit_rows() -> Iterator[FitRow]:
    """Every tower that an H200 measured, INT8 and float16."""
    for tower in TOWERS:
        key = float16.tower_key(tower.L, tower.D, tower.layers)
        for row in float16.MEASURED["NVIDIA H200"][key].rows:
            int8 = int8_us(H200, tower, row.batch, MEASURED) / 1e3
            float_ms = float16_us(H200, tower, row.batch) / 1e3
            yield FitRow(tower, row.batch, "int8", row.int8_ms, int8)
            yield FitRow(tower, row.batch, "float16", row.float16_ms, float_ms)


def tower_cells(gpu: Gpu, tower: Tower, batch: int) -> dict[str, float]:
    """Milliseconds of a tower: torch float16, and each form."""
    cells = {form.name: int8_us(gpu, tower, batch, form) / 1e3 for form in FORMS}
    return {"float16": float16_us(gpu, tower, batch) / 1e3} | cells


def print_fit() -> None:
    """The measured rows beside the account."""
    print("One H200, ms: measured, account, ratio")
    for row in fit_rows():
        print(
            f"  {row.tower.name:9} batch {row.batch:3} {row.kind:8} {row.measured_ms:8.3f}"
            f" {row.account_ms:8.3f} {row.ratio:5.2f}"
        )


def print_accounts() -> None:
    """One line a form: every launch of a block in microseconds."""
    for gpu in GPUS:
        for tower in TOWERS:
            for batch in BATCHES:
                print(f"\nPREDICTION {gpu.name}, {tower.name}, batch {batch}: us of a block")
                rows = {form.name: block_costs(gpu, tower, batch, form) for form in FORMS}
                for name, costs in {**rows, "torch": float16_costs(gpu, tower, batch)}.items():
                    parts = ", ".join(f"{cost.name} {cost.us:.1f}" for cost in costs)
                    total = sum(cost.us for cost in costs)
                    print(f"  {name:10} {len(costs)} launches {total:7.1f}: {parts}")


def print_towers() -> None:
    """Whole towers: milliseconds, and how many times faster than torch float16."""
    print("\nPREDICTION, ms of a tower as a CUDA graph (x torch float16)")
    print(f"{'GPU':6}{'tower':10}{'batch':>5}{'float16':>9}", *(f"{f.name:>16}" for f in FORMS))
    for gpu in GPUS:
        for tower in TOWERS:
            for batch in BATCHES:
                cells = tower_cells(gpu, tower, batch)
                base = cells.pop("float16")
                shown = "".join(f"{ms:10.3f} ({base / ms:4.2f}x)" for ms in cells.values())
                print(f"{gpu.name:6}{tower.name:10}{batch:5}{base:9.3f}{shown}")


def print_rules() -> None:
    """Up to how many rows seven launches are faster than nine."""
    print("\nPREDICTION, seven launches a block instead of nine are faster up to so many rows")
    for gpu in GPUS:
        for tower in TOWERS:
            print(f"  {gpu.name:6}{tower.name:10}{most_rows_of_seven(gpu, tower):6}")


def most_rows_of_seven(gpu: Gpu, tower: Tower) -> int:
    """The largest batch, in rows, at which seven launches take less than nine."""
    most = 0
    for batch in range(1, 129):
        if int8_us(gpu, tower, batch, SEVEN) < int8_us(gpu, tower, batch, FLOAT):
            most = batch * tower.L
    return most


def markdown() -> Iterator[str]:
    """The tower table of docs/gpu.md."""
    yield "| predicted | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"
    yield "|---" * (1 + len(BATCHES)) + "|"
    for gpu in GPUS:
        for tower in TOWERS:
            cells = [tower_cells(gpu, tower, batch) for batch in BATCHES]
            yield f"| {gpu.name}, {tower.name} | " + " | ".join(map(_cell, cells)) + " |"


def _cell(ms: dict[str, float]) -> str:
    """Both forms with their factors over torch float16."""
    base = ms["float16"]
    forms = (ms[form.name] for form in (FLOAT, PERSISTENT))
    return ", ".join(f"{each:.3g} ({base / each:.2f}x)" for each in forms)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="only the measured rows and the account")
    parser.add_argument("--markdown", action="store_true", help="only the tower table, for a page")
    options = parser.parse_args()
    if options.markdown:
        print("\n".join(markdown()))
        return
    print_fit()
    if not options.fit:
        print_accounts()
        print_towers()
        print_rules()


if __name__ == "__main__":
    main()
