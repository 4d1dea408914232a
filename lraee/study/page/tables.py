"""The tables of a report, as text."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lraee.study.page.formatting import backbone, chance, figure, interval, spread
from lraee.study.schema import ClassRescue, MainRow, Quadrants, Report

_SHOWN_CLASSES = 8
_NUMBER = re.compile(r"^(< )?\u2212?[\d.]|^\u2013$")


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of a row names it. A folded one opens on demand."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False

    def is_numeric(self, column: int) -> bool:
        """Whether all of a column are numbers or dashes."""
        return all(_NUMBER.match(row[column]) for row in self.rows)


def of_noise(report: Report) -> list[Table]:
    """Every figure of every block, a table per backbone."""
    header = (
        "block", "natural step", "quantization error", "NSR, %", "MSE", "cosine",
        "largest value", "INR", "exit",
    )  # fmt: skip
    tables = []
    for key, blocks in report["noise"].items():
        rows = []
        for b in blocks:
            place = "dropped" if b["is_dropped"] else "kept" if b["is_candidate"] else ""
            rows.append([
                str(b["block"]), figure(b["natural_step"]), figure(b["quantization_error"], 3),
                figure(100.0 * b["nsr"]), f"{b['mse']:.3g}", figure(b["cosine"], 5),
                figure(b["max_abs"]), figure(b["inr"], 1), place,
            ])  # fmt: skip
        tables.append(Table(f"Noise of {backbone(key)} by block", header, rows, is_folded=True))
    return tables


def of_lens(report: Report) -> list[Table]:
    """Top-1 of each head by block, a table per backbone."""
    header = ("block", "class-token head", "SSA head", "our head", "own projection")
    return [
        Table(
            f"Top-1 in percent from one block, {backbone(key)}",
            header,
            [
                [
                    str(row["block"]), spread(row["class_token_head"]), spread(row["ssa_head"]),
                    spread(row["best_head"]), figure(row["early_projection"]),
                ]
                for row in rows
            ],
            is_folded=True,
        )
        for key, rows in report["lens"].items()
    ]  # fmt: skip


def of_main(report: Report) -> list[Table]:
    """Our rows, and the published ones apart."""
    ours = _main_table("Zero-shot top-1 of every system on the report photos", report["main"])
    theirs = _main_table(
        "Published: ImageNet, other model; to read beside, not to compare", report["published"]
    )
    return [table for table in (ours, theirs) if table.rows]


def _main_table(caption: str, rows: Iterable[MainRow]) -> Table:
    header = ("system", "backbone", "top-1, %", "as float, %", "FLOPs saved, %", "seeds", "note")
    cells = [
        [
            row["name"], backbone(row["backbone"]), spread(row["top1"]), spread(row["agreement"]),
            spread(row["flops_saved"]), str(row["seeds"]), row["note"],
        ]
        for row in rows
    ]  # fmt: skip
    return Table(caption, header, cells)


def of_factorial(report: Report) -> list[Table]:
    """(i) to (v) per backbone."""
    rows = [
        [row["name"], backbone(row["backbone"]), spread(row["top1"]), spread(row["flops_saved"])]
        for row in report["factorial"]
    ]
    header = ("variant", "backbone", "top-1, %", "FLOPs saved, %")
    return [Table("What the head and the teaching each add", header, rows)] if rows else []


def of_pruned(report: Report) -> list[Table]:
    """The exit of lowest INR, kept and left out."""
    header = (
        "exit", "backbone", "its INR, % of mean", "rule drops it", "top-1 with it, %",
        "top-1 without, %", "FLOPs saved with, %", "FLOPs saved without, %",
    )  # fmt: skip
    rows = [
        [
            f"block {p['block']}", backbone(p["backbone"]), figure(p["inr_share_of_mean"]),
            "yes" if p["is_dropped_by_rule"] else "no", spread(p["kept"]["top1"]),
            spread(p["left_out"]["top1"]), spread(p["kept"]["flops_saved"]),
            spread(p["left_out"]["flops_saved"]),
        ]
        for p in report["pruned"]
    ]  # fmt: skip
    return [Table("The exit of lowest INR, kept and left out", header, rows)] if rows else []


def of_shares(report: Report) -> list[Table]:
    """Where images exit, a table per backbone and recipe."""
    header = ("exits after", "share of images, %", "top-1 of those, %")
    tables = []
    for shares in report["shares"]:
        rows = [
            [
                "full depth" if exit_["block"] == report["blocks"] else f"block {exit_['block']}",
                spread(exit_["share"]),
                spread(exit_["top1"]),
            ]
            for exit_ in shares["exits"]
        ]
        caption = f"Exit shares, {shares['recipe']}, {backbone(shares['backbone'])}"
        tables.append(Table(caption, header, rows))
    return tables


def of_quadrants(report: Report) -> list[Table]:
    """Counts, margin and test; who exited; and the gate's AUROC."""
    if not report["quadrants"]:
        return []
    counts = [
        [
            *_who(q), f"{q['both']:,}", f"{q['rescue']:,}", f"{q['loss']:,}", f"{q['neither']:,}",
            spread(q["margin"]), interval(*q["interval"]), chance(q["mcnemar_p"]),
        ]
        for q in report["quadrants"]
    ]  # fmt: skip
    exited = [
        [
            *_who(q), figure(q["left_share"]), figure(q["left_top1"]), figure(q["stayed_top1"]),
            ", ".join(f"{exit_}: {figure(value)}" for exit_, value in q["auroc"].items()),
        ]
        for q in report["quadrants"]
    ]  # fmt: skip
    who = ("recipe", "backbone")
    header = (*who, "both right", "rescue", "loss", "neither", "margin, points",
              "95 % interval, first seed", "McNemar p, first seed")  # fmt: skip
    selectivity = (*who, "exited early, %", "top-1 of those, %", "top-1 of the rest, %",
                   "AUROC by exit")  # fmt: skip
    return [
        Table("Right with exits and at full depth: images, all seeds together", header, counts),
        Table("Selectivity of the gate, first seed", selectivity, exited),
    ]


def of_owed(report: Report) -> list[Table]:
    """Margins beside those of the float control."""
    header = ("recipe", "backbone", "margin", "margin in float", "difference", "95 % interval")
    rows = [
        [
            o["recipe"], backbone(o["backbone"]), figure(o["margin"]), figure(o["float_margin"]),
            figure(o["difference"]), interval(*o["interval"]),
        ]
        for o in report["owed"]
    ]  # fmt: skip
    return [Table("Rescue margin beside the float control, points", header, rows)] if rows else []


def of_classes(report: Report) -> list[Table]:
    """Per backbone and recipe, the classes that gain and lose most."""
    tables = []
    for q in report["quadrants"]:
        rows = [
            [c["name"], str(c["rescued"]), str(c["lost"]), figure(c["rescued"] - c["lost"], 0)]
            for c in _extremes(q["classes"])
        ]
        caption = f"Classes that gain and lose most, {q['recipe']}, {backbone(q['backbone'])}"
        header = ("class", "rescued", "lost", "difference")
        if rows:
            tables.append(Table(caption, header, rows, is_folded=True))
    return tables


def _extremes(classes: Sequence[ClassRescue]) -> list[ClassRescue]:
    ordered = sorted(classes, key=lambda c: c["lost"] - c["rescued"])
    if len(ordered) <= 2 * _SHOWN_CLASSES:
        return ordered
    return ordered[:_SHOWN_CLASSES] + ordered[-_SHOWN_CLASSES:]


def of_drift(report: Report) -> list[Table]:
    """Flipped and kept answers at full depth, per backbone."""
    header = (
        "backbone", "answers flipped", "margin of flipped", "margin of kept",
        "angle of flipped, degrees", "angle of kept, degrees", "rank correlation",
    )  # fmt: skip
    rows = [
        [
            backbone(d["backbone"]), f"{d['flipped']:,}", figure(d["margin_flipped"], 4),
            figure(d["margin_kept"], 4), figure(d["angle_flipped"]), figure(d["angle_kept"]),
            figure(d["correlation"]),
        ]
        for d in report["drift"]
    ]  # fmt: skip
    return [Table("Answers that quantization flips at full depth", header, rows)] if rows else []


def of_costs(report: Report) -> list[Table]:
    """FLOPs and time saved, and what heads cost."""
    header = ("system", "backbone", "FLOPs saved, %", "time saved, %", "heads, % of the tower")
    rows = [
        [
            c["name"], backbone(c["backbone"]), figure(c["flops_saved"]), figure(c["time_saved"]),
            figure(c["head_share"]),
        ]
        for c in report["costs"]
    ]  # fmt: skip
    return [Table("What exits save", header, rows)] if rows else []


def of_frontier(report: Report) -> list[Table]:
    """Every point of the frontier."""
    header = ("system", "backbone", "budget", "FLOPs saved, %", "top-1, %", "as float, %")
    rows = [
        [
            p["name"], backbone(p["backbone"]), figure(p["budget"]), spread(p["flops_saved"]),
            spread(p["top1"]), spread(p["agreement"]),
        ]
        for p in report["frontier"]
    ]  # fmt: skip
    caption = "Every point of the frontier"
    return [Table(caption, header, rows, is_folded=True)] if rows else []


def _who(part: Quadrants) -> tuple[str, str]:
    return part["recipe"], backbone(part["backbone"])
