"""The charts of a report: which figures go on which axis."""

from collections.abc import Callable, Sequence

from lraee.study import evidence, schema
from lraee.study.evidence import Difference
from lraee.study.page.charts import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    Chart,
    Interval,
    Intervals,
    Line,
    Look,
)
from lraee.study.page.formatting import backbone
from lraee.study.schema import Drift, FrontierPoint, Lens, Noise, Report, Spread, Sweep

_OTHER = Look(ORANGE, "v-.")
_OF_BACKBONE = {"float": Look(INK, "o:"), "int8": Look(BLUE, "s-"), "paper": Look(RED, "^--")}
_OF_SYSTEM = {
    schema.BEST: Look(BLUE, "o-"),
    schema.PUBLISHED: Look(RED, "D-"),
    schema.PABEE: Look(PURPLE, "^--"),
    schema.CONFIDENCE: Look(GREEN, "s--"),
    schema.STATIC: Look(INK, "x:"),
}
_HEADS: dict[str, tuple[str, Look]] = {
    "best_head": ("our head (both)", Look(GREEN, "o-")),
    "ssa_head": ("SSA head (patch mean)", Look(BLUE, "s--")),
    "class_token_head": ("class-token head", Look(RED, "^-.")),
}


def of_noise(report: Report) -> list[Chart]:
    """Noise to signal, and information to noise, by depth."""

    def chart(name: str, title: str, label: str, value: Callable[[Noise], float]) -> Chart:
        lines = [
            Line(backbone(key), _look(key), [b["block"] for b in rows], [value(b) for b in rows])
            for key, rows in report["noise"].items()
            if rows
        ]
        return Chart(name, title, "block", label, lines, is_log=name == "inr")

    charts = [
        chart("nsr", "Noise-to-signal ratio by depth", "NSR, %", lambda b: 100.0 * b["nsr"]),
        chart("inr", "Information-to-noise ratio by depth", "INR", lambda b: b["inr"]),
    ]
    return [each for each in charts if each.lines]


def of_lens(report: Report) -> list[Chart]:
    """Top-1 of each kind of head by depth, a chart per backbone."""
    return [
        _lens_of(f"lens{i}", key, rows)
        for i, (key, rows) in enumerate(report["lens"].items())
        if rows
    ]


def _lens_of(name: str, key: str, rows: Sequence[Lens]) -> Chart:
    blocks = [row["block"] for row in rows]
    spreads: dict[str, list[Spread]] = {
        "best_head": [row["best_head"] for row in rows],
        "ssa_head": [row["ssa_head"] for row in rows],
        "class_token_head": [row["class_token_head"] for row in rows],
    }
    lines = [
        Line(label, look, blocks, _means(spreads[head]), _stds(spreads[head]))
        for head, (label, look) in _HEADS.items()
    ]
    early = [row["early_projection"] for row in rows]
    lines.append(Line("tower's own projection", Look(INK, "x:"), blocks, early))
    title = f"Top-1 from the tokens of one block, {backbone(key)}"
    return Chart(name, title, "block", "top-1, %", lines)


def of_factorial(report: Report) -> list[Intervals]:
    """Top-1 of (i) to (v), a chart per backbone; bars of one standard deviation."""
    charts = []
    for i, key in enumerate(dict.fromkeys(row["backbone"] for row in report["factorial"])):
        rows = [
            Interval(
                row["name"].split(" ")[0][:8], _look(key), row["top1"]["mean"],
                row["top1"]["mean"] - row["top1"]["std"], row["top1"]["mean"] + row["top1"]["std"],
            )
            for row in report["factorial"]
            if row["backbone"] == key
        ]  # fmt: skip
        title = f"Factorial, {backbone(key)}"
        charts.append(Intervals(f"factorial{i}", title, "top-1, %", rows))
    return charts


def of_sweeps(report: Report) -> list[Chart]:
    """Top-1 against FLOPs saved of both gates, a chart per sweep."""
    return [_sweep(f"sweep{i}", sweep) for i, sweep in enumerate(report["sweeps"])]


def _sweep(name: str, sweep: Sweep) -> Chart:
    pairs = (
        ("learned gate", Look(BLUE, "o-"), sweep["learned"]),
        ("confidence alone", Look(RED, "^--"), sweep["confidence"]),
    )
    lines = []
    for label, look, points in pairs:
        ordered = sorted(points, key=lambda p: p["flops_saved"])
        x, y = [p["flops_saved"] for p in ordered], [p["top1"] for p in ordered]
        lines.append(Line(label, look, x, y))
    title = f"Both gates on the same heads, {sweep['recipe']}, {backbone(sweep['backbone'])}"
    return Chart(name, title, "FLOPs saved, %", "top-1, %", lines)


def of_margins(report: Report) -> list[Intervals]:
    """Rescue margins, 2 standard errors either way."""
    rows = []
    for part in report["quadrants"]:
        seeds, photos = len(report["seeds"]), report["reported_on"]
        margin = evidence.of_margin(part, seeds=seeds, photos=photos)
        rows.append(_interval(part["backbone"], part["recipe"], margin))
    title = "Rescue margin, two standard errors either way"
    return [Intervals("margins", title, "points of top-1", rows, True)] if rows else []


def of_owed(report: Report) -> list[Intervals]:
    """What of the margins is owed to quantization, with 95 % intervals."""
    rows = [
        _interval(o["backbone"], o["recipe"], Difference(o["difference"], *o["interval"]))
        for o in report["owed"]
    ]
    title = "Rescue margin above that in float, 95 % interval"
    return [Intervals("owed", title, "points of top-1", rows, True)] if rows else []


def _interval(key: str, recipe: str, value: Difference) -> Interval:
    label = f"{backbone(key)}\n{recipe}"
    return Interval(label, _look(key), value.points, value.low, value.high)


def of_drift(report: Report) -> list[Chart]:
    """Angle by depth, and flipped answers by float margin."""
    rows: list[Drift] = report["drift"]
    by_depth = [
        Line(backbone(d["backbone"]), _look(d["backbone"]), _count(d["angle"]), d["angle"])
        for d in rows
    ]
    by_margin = [
        Line(backbone(d["backbone"]), _look(d["backbone"]), _count(parts),
             [part["flipped"] for part in parts])
        for d in rows
        for parts in [[part for part in d["by_margin"] if "flipped" in part]]
    ]  # fmt: skip
    charts = [
        Chart("drift", "Angle between float and quantized embedding", "block",
              "angle, degrees", by_depth),
        Chart("flips", "Answers that quantization flips, by float margin",
              "tenth of the images, smallest margin first", "flipped, %", by_margin),
    ]  # fmt: skip
    return [each for each in charts if any(line.x for line in each.lines)]


def of_frontier(report: Report) -> list[Chart]:
    """Top-1 and agreement against FLOPs saved; the first backbone that has points."""
    points = report["frontier"]
    if not points:
        return []
    key = points[0]["backbone"]
    points = [p for p in points if p["backbone"] == key]
    full = [r for r in report["main"] if (r["name"], r["backbone"]) == (schema.FULL_DEPTH, key)]
    level = (full[0]["top1"]["mean"], "full depth") if full else None
    on = backbone(key)
    x_label = "FLOPs saved, heads counted, %"
    return [
        Chart("top1", f"Top-1 against FLOPs saved, {on}", x_label, "top-1, %",
              _systems(points, lambda p: p["top1"]), level),
        Chart("agreement", f"Agreement with float against FLOPs saved, {on}", x_label,
              "same answer as float, %", _systems(points, lambda p: p["agreement"])),
    ]  # fmt: skip


def _systems(points: Sequence[FrontierPoint], of: Callable[[FrontierPoint], Spread]) -> list[Line]:
    lines = []
    for name in dict.fromkeys(p["name"] for p in points):
        own = sorted((p for p in points if p["name"] == name), key=lambda p: -p["budget"])
        x = [p["flops_saved"]["mean"] for p in own]
        y = [of(p) for p in own]
        lines.append(Line(name, _OF_SYSTEM.get(name, _OTHER), x, _means(y), _stds(y)))
    return lines


def _look(key: str) -> Look:
    return _OF_BACKBONE.get(key, _OTHER)


def _count(values: Sequence[object]) -> list[float]:
    return [float(i) for i in range(1, len(values) + 1)]


def _means(spreads: Sequence[Spread]) -> list[float]:
    return [each["mean"] for each in spreads]


def _stds(spreads: Sequence[Spread]) -> list[float]:
    return [each["std"] for each in spreads]
