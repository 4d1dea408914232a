"""What the command line shows: reports as tables, for a narrow terminal.

Names come from files: they are Text, in which rich sees no markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from lraee.data.names import printable

if TYPE_CHECKING:
    from lraee.exits.bundle import Exits

Figures = Mapping[str, tuple[str, float, int]]
"""Key in a report's row -> title, factor, digits behind the point."""

_FORMS: Figures = {
    "top1": ("top-1 %", 1.0, 2),
    "top5": ("top-5 %", 1.0, 2),
    "agreement": ("top-1 as float's %", 1.0, 2),
    "error": ("relative error", 1.0, 4),
    "neighbours": ("nearest photo as float's %", 1.0, 2),
    "neighbours_95": ("  95 % interval", 1.0, 1),
    "neighbours_10": ("ten nearest as float's %", 1.0, 2),
    "neighbours_10_95": ("  95 % interval", 1.0, 1),
    "cosine_mean": ("cosine with float's, mean", 1.0, 5),
    "cosine_p01": ("cosine, 1st percentile", 1.0, 5),
    "time_ms": ("ms per photo", 1.0, 2),
    "weight_bytes": ("image tower, MB", 1e-6, 2),
    "flops_saved": ("FLOPs saved, %", 1.0, 1),
    "not_finite": ("photos not finite", 1.0, 0),
}
_RETRIEVAL: Figures = {
    **{f"recall_{k}": (f"float's first in first {k}, %", 1.0, 2) for k in (1, 5, 10)},
    **{f"class_{k}": (f"own class in first {k}, %", 1.0, 2) for k in (1, 5, 10)},
}


def of_forms(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Forms of the model as columns, figures of `lraee evaluate` as rows."""
    return _by_form(rows, _FORMS)


def of_retrieval(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Forms of the model as columns, recall as rows."""
    return _by_form(rows, _RETRIEVAL)


def _by_form(rows: Sequence[Mapping[str, Any]], figures: Figures) -> Table:
    table = Table("", *(Column(Text(row["scheme"])) for row in rows))
    for key, (title, factor, digits) in figures.items():
        cells = [_number(row[key], factor, digits) for row in rows]
        if any(cells):
            table.add_row(title, *cells)
    return table


def _number(value: float | Sequence[float] | None, factor: float, digits: int) -> str:
    if isinstance(value, Sequence):
        return " to ".join(_number(end, factor, digits) for end in value)
    return "" if value is None else f"{factor * value:.{digits}f}"


def of_answers(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each photo is taken for by each form; red where it is not float's answer."""
    table = Table(Column("photo", overflow="fold"), "float", "int8", "with exits", "exits after")
    for row in rows:
        cells = []
        for form in ("float", "int8", "exits"):
            is_same = row[f"{form}_name"] == row["float_name"]
            text = f"{row[f'{form}_name']} {100 * row[f'{form}_share']:.0f} %"
            cells.append(Text(text, style="" if is_same else "red"))
        table.add_row(Text(printable(row["photo"])), *cells, f"block {row['exit_block']}")
    return table


def of_plans(exits: "Exits") -> Table:
    """What each gate did on the images that thresholds were picked on."""
    table = Table("gate", "after blocks", "exits there, %", "FLOPs saved, %", "right, %", "full, %")
    for name, row in exits.card["plans"].items():
        mark = " (chosen)" if name == exits.chosen else ""
        table.add_row(
            Text(name + mark),
            " ".join(map(str, row["exits"])) or "none",
            " ".join(f"{100 * share:.0f}" for share in row["share"][:-1]),
            f"{100 * row['flops_saved']:.1f}",
            f"{100 * row['gain']:.2f}",
            f"{100 * row['gain_at_full_depth']:.2f}",
        )
    return table


def of_depths(depths: Sequence[Mapping[str, Any]]) -> Table:
    """What a search would find at each depth that exits for search may have."""
    table = Table(
        "after block", "FLOPs saved, %", "nearest photo as at full depth, %", "among the first 5, %"
    )
    for row in depths:
        shares = (row["flops_saved"], row["nearest"], row["among_five"])
        table.add_row(str(row["block"]), *(f"{100 * share:.1f}" for share in shares))
    return table


def card_lines(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a calibration was, in a few lines: key and text."""
    images = ", ".join(f"{count} for {name}" for name, count in card["images"].items())
    yield "images", images
    dropped = ", ".join(map(str, card["dropped"])) or "none"
    yield "candidates", f"after {', '.join(map(str, card['candidates']))}; noise drops {dropped}"
    goal = card["goal"]
    if goal["epsilon"] is None:
        yield "goal", f"at most {100 * goal['budget']:.0f} % of full depth's FLOPs"
    else:
        yield "goal", f"loss of at most {goal['epsilon']} with probability {1 - goal['delta']:g}"
    for name, row in card["plans"].items():
        if row.get("is_certified") is False:
            yield "not proven", f"{name}: too few images for this loss; every image runs to the end"
    if card["time"] is not None:
        time = card["time"]
        pairs = zip(time["probe_us"], time["tower_us"], strict=True)
        shares = ", ".join(f"{100 * probe / tower:.2f} %" for probe, tower in pairs)
        doubt = "" if time.get("is_conclusive", True) else "; inconclusive, the machine was busy"
        yield "a probe takes", f"{shares} of the tower's time at batch 1, 32{doubt}"


def of_selftest(report: Mapping[str, Any]) -> Iterator[Table]:
    """Kernels and their cases, each case that differs, then times or why there are none."""
    rows = report["rows"]
    table = Table("kernel", "cases", "differ")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        differs = [row["difference"] is not None for row in rows if row["kernel"] == kernel]
        table.add_row(kernel, str(len(differs)), str(sum(differs)))
    yield table
    wrong = [row for row in rows if row["difference"] is not None]
    if wrong:
        table = Table("kernel", "config", "shape", "first difference")
        for row in wrong[:20]:
            cells = (row["kernel"], row["config"], row["shape"], row["difference"])
            table.add_row(*map(Text, cells))
        yield table
    if not report["times"]:
        yield Table("no timings: they need the GPU itself", box=None)
        return
    table = Table("kernel", "shape", "variant", "ms", "p20-p80", "lraee x faster")
    for row in report["times"]:
        t = row["timing"]
        span = (f"{t['median_ms']:.4f}", f"{t['p20_ms']:.4f}-{t['p80_ms']:.4f}") if t else ("", "")
        what = row["error"] or row["variant"]
        speedup = _number(row["speedup"], 1.0, 2)
        table.add_row(row["kernel"], row["shape"], Text(what), *span, speedup)
    yield table
