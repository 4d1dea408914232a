"""Lines of a sweep into kernels/measured.py: the bit-equal that are faster by the spread."""

import math
import pprint
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_sweep.lines import KERNELS, kernels_hash, read_lines
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal
from lraee.kernels.measured import ANY_M, MEASURED

Table = dict[tuple[int, int], tuple[tuple[int, tuple[int, ...]], ...]]
PATH = KERNELS / "measured.py"


@dataclass(frozen=True)
class Timed:
    """A candidate of one product, microseconds."""

    shape: Shape
    config: tuple[int, ...]
    is_pick: bool
    us: float
    p20_us: float
    p80_us: float


def timed_products(lines: Iterable[Mapping[str, Any]], kernels: str) -> Iterator[Timed]:
    """Bit-equal configs of the simple kernel in lines of these kernels; all else is left out.

    Other families are not picked blindly: the table of `lraee tune` may name them, this one not.
    """
    for line in lines:
        if line.get("step") != "products" or line.get("kernels") != kernels:
            continue
        if line.get("family") != "simple" or line.get("equal") is not True:
            continue
        sizes, config = [line.get(name) for name in "MNK"], line.get("config")
        times: list[Any] = [line.get(name) for name in ("us", "p20_us", "p80_us")]
        if not all(_is_size(size) for size in sizes) or not all(_is_time(us) for us in times):
            continue
        if not isinstance(config, list) or len(config) != 6 or not all(map(_is_size, config)):
            continue
        M, N, K = sizes
        shape, numbers = Shape(M, N, K), tuple(config)
        yield Timed(shape, numbers, line.get("is_pick") is True, *times)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= ANY_M


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def winners(products: Iterable[Timed], capability: int) -> dict[Shape, tuple[Timed, Timed]]:
    """Shape -> present pick and the fastest legal config, where the latter wins by the spread."""
    by_shape: dict[Shape, dict[tuple[int, ...], Timed]] = {}
    for one in products:
        by_shape.setdefault(one.shape, {})[one.config] = one
    result = {}
    for shape, configs in by_shape.items():
        pick = next((one for one in configs.values() if one.is_pick), None)
        rivals = [
            one for one in configs.values()
            if pick is not None and one.p80_us < pick.p20_us
            and legal(Config(*one.config), shape, ARCHS[capability])
        ]  # fmt: skip
        if pick is not None and rivals:
            result[shape] = pick, min(rivals, key=lambda one: one.us)
    return result


def folded(products: list[Timed], capability: int) -> Table:
    """The table of this architecture with its winners; a layer without one stays as it is.

    Rows of a layer with a winner are made anew from all M that were measured: the winner, or the
    pick of then. Each holds up to the geometric mean of its M and the next.
    """
    table: Table = dict(MEASURED.get(capability, {}))
    won = winners(products, capability)
    for N, K in {(shape.N, shape.K) for shape in won}:
        picks = {one.shape: one for one in products
                 if one.is_pick and (one.shape.N, one.shape.K) == (N, K)}  # fmt: skip
        shapes = sorted(picks, key=lambda shape: shape.M)
        best = [won[shape][1] if shape in won else picks[shape] for shape in shapes]
        limits = [math.isqrt(a.M * b.M) for a, b in zip(shapes, shapes[1:], strict=False)]
        rows = list(zip([*limits, ANY_M], [one.config for one in best], strict=True))
        merged = [
            row for row, after in zip(rows, [*rows[1:], None], strict=True)
            if after is None or after[1] != row[1]
        ]  # fmt: skip
        table[N, K] = tuple(merged)
    return table


def render(source: str, capability: int, table: Table) -> str:
    """The text of measured.py with this architecture's table in place of what it had."""
    tables = {**MEASURED, capability: table}
    shown = pprint.pformat(tables, width=96, sort_dicts=False)
    shown = shown.replace(str(ANY_M), "ANY_M")
    head = source[: source.index("MEASURED:")]
    annotation = re.search(r"^MEASURED: [^=]+= ", source, re.MULTILINE)
    assert annotation is not None
    return f"{head}{annotation[0]}{shown}  # fmt: skip\n"


def fold_file(path: Path, target: Path = PATH) -> list[str]:
    """Rewrites measured.py from a file of lines, and says what changed, measured beside predicted.

    Raises: SystemExit where no line is of these kernels.
    """
    lines = list(read_lines(path))
    capabilities = {
        int(str(line.get("capability"))[3:])
        for line in lines
        if line.get("step") == "versions" and re.fullmatch(r"sm_\d+", str(line.get("capability")))
    }
    if len(capabilities) != 1 or not capabilities <= ARCHS.keys():
        raise SystemExit(f"fold: lines must name one known capability, got {sorted(capabilities)}")
    (capability,) = capabilities
    products = list(timed_products(lines, kernels_hash()))
    if not products:
        raise SystemExit("fold: no line of a product holds for these kernels")
    won = winners(products, capability)
    if won:
        target.write_text(render(target.read_text(), capability, folded(products, capability)))
    rows = [
        f"M={shape.M} N={shape.N} K={shape.K}: {list(best.config)} {best.us:.1f} us,"
        f" before {list(pick.config)} {pick.us:.1f} us"
        for shape, (pick, best) in won.items()
    ]
    rows.append(f"{len(won)} of {len({one.shape for one in products})} shapes changed")
    return rows + list(beside_predictions(lines))


def beside_predictions(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows of a page: towers as they were measured, beside the account of bench.gpu_model."""
    from bench.gpu_account import FLOAT, PERSISTENT, float16_us, int8_us
    from bench.gpu_parts import GPUS
    from bench.shapes import TOWERS

    for line in lines:
        name, _, batch = str(line.get("shape")).partition(" batch ")
        gpu = next((gpu for gpu in GPUS if gpu.name in str(line.get("gpu"))), None)
        tower = next((tower for tower in TOWERS if tower.open_clip == name), None)
        ms = line.get("ms")
        is_row = line.get("step") == "towers" and batch.isdecimal() and _is_time(ms)
        if not is_row or gpu is None or tower is None:
            continue
        n = int(batch)
        if line.get("variant") == "lraee":
            forms = [f"{int8_us(gpu, tower, n, form) / 1e3:.3f}" for form in (FLOAT, PERSISTENT)]
        elif line.get("variant") == "torch graph":
            forms = [f"{float16_us(gpu, tower, n) / 1e3:.3f}"]
        else:
            continue
        yield f"| {tower.name} | {n} | {line['variant']} | {ms} | {' / '.join(forms)} (predicted) |"
