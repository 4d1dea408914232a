"""The paper's claims beside what a report's data say, in plain words; the rule is in evidence.

A claim is judged on its own terms where they were measured: the paper's quantization scheme and
recipe. Its text gives the other backbones too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lraee.study import evidence, schema
from lraee.study.evidence import Difference, signed
from lraee.study.schema import Finding, MainRow, Report

JUDGED_ON = ("paper", "int8", "float")
SCHEMES = {
    "float": "in float",
    "int8": "in lraee's INT8",
    "paper": "in the paper's INT8",
}
NOT_RUN = "Not measured in this run."
_TIME_SHARE = 0.5  # of the FLOPs saved: less of it in time is a claim that fails

Judged = tuple[bool | None, str]


def findings(report: Report) -> list[Finding]:
    """One finding per claim, in the order of the paper; pure, and reads no `findings`."""
    return [
        {"claim": claim, "holds": holds, "words": text}
        for claim, judge in CLAIMS.items()
        for holds, text in [judge(report)]
    ]


def scheme(backbone: str) -> str:
    """A backbone in words."""
    return SCHEMES.get(backbone, f"on {backbone}")


def _who(part: Any) -> str:
    """Backbone and recipe of a part."""
    return f"{scheme(part['backbone'])} ({part['recipe']})"


def _sentences(lead: str, parts: Sequence[str]) -> str:
    """What was judged, and then the rest."""
    rest = f" Elsewhere: {'; '.join(parts[1:])}." if parts[1:] else ""
    return f"{lead}: {parts[0]}.{rest}"


def _capital(name: str) -> str:
    """As a sentence begins."""
    return name[:1].upper() + name[1:]


# Finding rows


def row_of(report: Report, name: str, backbone: str) -> MainRow | None:
    """The row of this system in the main table."""
    rows = (r for r in report["main"] if (r["name"], r["backbone"]) == (name, backbone))
    return next(rows, None)


def _order(backbone: str) -> int:
    return JUDGED_ON.index(backbone) if backbone in JUDGED_ON else len(JUDGED_ON)


def _ranked(parts: Iterable[Any]) -> list[Any]:
    """As JUDGED_ON has backbones, and the recipe as published before others."""
    return sorted(
        parts,
        key=lambda p: (_order(p["backbone"]), p.get("recipe") not in (None, schema.PUBLISHED)),
    )


def _differences(report: Report, better: str, worse: str) -> dict[str, Difference]:
    """Top-1 of one system - of another, on each backbone that has both."""
    differences = {}
    for backbone in JUDGED_ON:
        rows = (row_of(report, better, backbone), row_of(report, worse, backbone))
        if rows[0] and rows[1]:
            differences[backbone] = evidence.of_rows(rows[0], rows[1], photos=report["reported_on"])
    return differences


def _first(differences: Mapping[str, Difference], text: str) -> Judged:
    """The verdict of the first backbone; text with each of them."""
    if not differences:
        return None, NOT_RUN
    parts = [f"{scheme(backbone)} {value}" for backbone, value in differences.items()]
    return next(iter(differences.values())).holds, _sentences(text, parts)


# The claims


def _collapse(report: Report) -> Judged:
    in_float = row_of(report, schema.FULL_DEPTH, "float")
    differences = {}
    for backbone in ("paper", "int8"):
        row = row_of(report, schema.FULL_DEPTH, backbone)
        if row and in_float:
            differences[backbone] = evidence.of_rows(in_float, row, photos=report["reported_on"])
    return _first(differences, "Top-1 that full depth loses to quantization")


def _noise_grows(report: Report) -> Judged:
    """Holds if Spearman's correlation of NSR and depth is beyond 2 / sqrt(blocks - 1)."""
    verdicts, parts = [], []
    for backbone in JUDGED_ON:
        nsr = [100.0 * block["nsr"] for block in report["noise"].get(backbone, [])]
        if len(nsr) < 3:
            continue
        third = max(len(nsr) // 3, 1)
        rank = evidence.rank_correlation(nsr)
        limit = 2.0 / math.sqrt(len(nsr) - 1)
        verdicts.append(True if rank > limit else False if rank < -limit else None)
        first, last = sum(nsr[:third]) / third, sum(nsr[-third:]) / third
        parts.append(
            f"{scheme(backbone)} from {first:.1f} % in the first third of the blocks to "
            f"{last:.1f} % in the last (rank correlation with depth {signed(rank)}, "
            f"beyond {limit:.2f} is a trend)"
        )
    if not parts:
        return None, NOT_RUN
    return verdicts[0], _sentences("Noise-to-signal ratio", parts)


def _shallow_heads(report: Report) -> Judged:
    differences, text = {}, []
    depth = round(2 * report["blocks"] / 3)  # the paper's first exit: block 8 of 12
    for backbone in JUDGED_ON:
        for lens in report["lens"].get(backbone, []):
            if lens["block"] == depth:
                heads = lens["ssa_head"], lens["class_token_head"]
                seeds, photos = len(report["seeds"]), report["reported_on"]
                differences[backbone] = evidence.of_spreads(*heads, seeds=seeds, photos=photos)
                text.append(
                    f"{scheme(backbone)} {heads[0]['mean']:.2f} % against {heads[1]['mean']:.2f} %"
                    f", {differences[backbone]}"
                )
    if not differences:
        return None, NOT_RUN
    lead = f"Head on the patch mean against head on the class token, after block {depth}"
    return next(iter(differences.values())).holds, _sentences(lead, text)


def _learned_gate(report: Report) -> Judged:
    verdicts, parts = [], []
    for sweep in _ranked(report["sweeps"]):
        difference = _mean_gap(
            [(p["flops_saved"], p["top1"], p["agreement"]) for p in sweep["learned"]],
            [(p["flops_saved"], p["top1"], p["agreement"]) for p in sweep["confidence"]],
            report["reported_on"],
        )
        if difference:
            verdicts.append(difference.holds)
            parts.append(f"{_who(sweep)} {difference}")
    if not parts:
        return None, NOT_RUN
    lead = "Top-1 of the learned gate above confidence alone, mean over equal FLOPs"
    return verdicts[0], _sentences(lead, parts)


Curve = list[tuple[float, float, float]]
"""FLOPs saved, top-1, agreement."""


def _mean_gap(better: Curve, worse: Curve, photos: int) -> Difference | None:
    """Mean difference of two curves at 21 savings that both reach."""
    if not better or not worse:
        return None
    low = max(min(better)[0], min(worse)[0])
    high = min(max(better)[0], max(worse)[0])
    if high <= low:
        return None
    savings = [low + (high - low) * i / 20 for i in range(21)]
    pairs = [(_at(better, saved), _at(worse, saved)) for saved in savings]
    gap = sum(a[0] - b[0] for a, b in pairs) / len(pairs)
    # The error of a mean is at most the mean of the errors.
    errors = [evidence.changed_variance(200.0 - a[1] - b[1], photos) ** 0.5 for a, b in pairs]
    return evidence.between(gap, (sum(errors) / len(errors)) ** 2)


def _at(curve: Curve, saved: float) -> tuple[float, float]:
    """Top-1 and agreement at this saving, on the line between its neighbours."""
    points = sorted(curve)
    after = next((i for i, point in enumerate(points) if point[0] >= saved), len(points) - 1)
    a, b = points[max(after - 1, 0)], points[after]
    share = (saved - a[0]) / (b[0] - a[0]) if b[0] > a[0] else 1.0
    top1, agreement = (a[k] + share * (b[k] - a[k]) for k in (1, 2))
    return top1, agreement


def _pruning(report: Report) -> Judged:
    if not report["pruned"]:
        return None, NOT_RUN
    dropped = [p for p in _ranked(report["pruned"]) if p["is_dropped_by_rule"]]
    rows = dropped or _ranked(report["pruned"])
    differences = [
        (p, evidence.of_rows(p["left_out"], p["kept"], photos=report["reported_on"])) for p in rows
    ]
    parts = [f"{scheme(p['backbone'])} without block {p['block']} {d}" for p, d in differences]
    if not dropped:
        lead = "The rule drops no exit here; top-1 when the one of lowest INR goes all the same"
        return None, _sentences(lead, parts)
    return differences[0][1].holds, _sentences("Top-1 without the exit that the rule drops", parts)


def _rescue(report: Report) -> Judged:
    """The margin decides; McNemar's test of the first seed must agree where it is above 0."""
    verdicts: list[bool | None] = []
    parts = []
    for part in _ranked(report["quadrants"]):
        margin = evidence.of_margin(part, seeds=len(report["seeds"]), photos=report["reported_on"])
        is_chance = margin.holds is True and part["mcnemar_p"] >= 0.05
        verdicts.append(None if is_chance else margin.holds)
        parts.append(f"{_who(part)} {margin}, McNemar p = {part['mcnemar_p']:.2g}")
    if not parts:
        return None, NOT_RUN
    return verdicts[0], _sentences("Rescued minus lost photos", parts)


def _selective(report: Report) -> Judged:
    verdicts, parts = [], []
    for part in _ranked(report["quadrants"]):
        exited, stayed = part["left_top1"], part["stayed_top1"]
        if exited is None or stayed is None:
            continue
        share = part["left_share"] / 100.0
        photos = share * report["reported_on"], (1.0 - share) * report["reported_on"]
        difference = evidence.of_shares(exited, stayed, photos)
        verdicts.append(difference.holds)
        parts.append(f"{_who(part)} {exited:.2f} % against {stayed:.2f} %, {difference}")
    if not parts:
        return None, NOT_RUN
    lead = "Top-1 of photos that exited early against those that stayed"
    return verdicts[0], _sentences(lead, parts)


def _distillation(report: Report) -> Judged:
    differences, parts = [], []
    for backbone in JUDGED_ON:
        rows = {
            row["name"].split(")")[0] + ")": row["top1"]
            for row in report["factorial"]
            if row["backbone"] == backbone
        }
        for what, distilled, labels in (("exits", "(v)", "(iv)"), ("last block", "(iii)", "(ii)")):
            if distilled in rows and labels in rows:
                pair = rows[distilled], rows[labels]
                seeds, photos = len(report["seeds"]), report["reported_on"]
                differences.append(evidence.of_spreads(*pair, seeds=seeds, photos=photos))
                parts.append(f"{scheme(backbone)} ({what}) {differences[-1]}")
    if not differences:
        return None, NOT_RUN
    return differences[0].holds, _sentences(
        "Top-1 of distilled heads above heads from labels", parts
    )


def _beats(baseline: str) -> Callable[[Report], Judged]:
    """LRA-EE's accuracy at the FLOPs that the baseline saves, interpolated between its points."""

    def judge(report: Report) -> Judged:
        for backbone in ("int8", "paper", "float"):
            row = row_of(report, baseline, backbone)
            for name in (schema.BEST, schema.PUBLISHED):
                curve = _curve(report, name, backbone)
                if row and len(curve) > 1:
                    return _against(report, row, name, curve)
        return None, NOT_RUN

    return judge


def _curve(report: Report, name: str, backbone: str) -> Curve:
    """Full depth and all points of one system; empty if it has none of its own."""
    rows: list[Any] = [*report["main"], *report["frontier"]]
    own = [row for row in rows if (row["name"], row["backbone"]) == (name, backbone)]
    full = row_of(report, schema.FULL_DEPTH, backbone)
    rows = [*own, full] if own and full else own
    return [
        (r["flops_saved"]["mean"], r["top1"]["mean"], r["agreement"]["mean"])
        for r in rows
        if r["agreement"]
    ]


def _against(report: Report, baseline: MainRow, name: str, curve: Curve) -> Judged:
    saved, where = baseline["flops_saved"]["mean"], scheme(baseline["backbone"])
    own = row_of(report, name, baseline["backbone"])
    spread = own["top1"]["std"] if own else 0.0
    theirs = f"{baseline['top1']['mean']:.2f} % at {saved:.1f} % of FLOPs saved"
    if not min(curve)[0] <= saved <= max(curve)[0]:
        return (
            None,
            f"{_capital(baseline['name'])} {where} has {theirs}, where {name} was not measured.",
        )
    top1, agreement = _at(curve, saved)
    ours: MainRow = {
        **baseline,
        "top1": {"mean": top1, "std": spread},
        "agreement": {"mean": agreement, "std": 0.0},
        "seeds": own["seeds"] if own else 1,
    }
    difference = evidence.of_rows(ours, baseline, photos=report["reported_on"])
    return difference.holds, (
        f"{_capital(baseline['name'])} {where} has {theirs},"
        f" {name} there {top1:.2f} %: {difference}."
    )


def _smoothing(report: Report) -> Judged:
    exits = _differences(report, schema.SMOOTHED_EXITS, schema.PUBLISHED)
    full = _differences(report, schema.SMOOTHED, schema.FULL_DEPTH)
    holds, text = _first(exits, "Top-1 that SmoothQuant adds to exits")
    if not full:
        return holds, text
    at_full, more = _first(full, "At full depth it adds")
    return (holds, f"{text} {more}") if exits else (at_full, more)


def _owed(report: Report) -> Judged:
    """Cannot hold where there is no rescue: a margin that is not above 0 is owed to nothing."""
    owed = _ranked(report["owed"])
    if not owed:
        return None, NOT_RUN
    parts = [
        f"{_who(part)} {signed(part['margin'])} against {signed(part['float_margin'])} in float, "
        f"{Difference(part['difference'], *part['interval'])}"
        for part in owed
    ]
    holds = Difference(owed[0]["difference"], *owed[0]["interval"]).holds
    lead = "rescue margin above that of the same exits on the float model"
    if holds and owed[0]["margin"] <= 0.0:
        return None, _sentences(f"On balance nothing is rescued that could be owed; {lead}", parts)
    return holds, _sentences(_capital(lead), parts)


def _time(report: Report) -> Judged:
    """Holds if at least half of the FLOPs saved is saved in time, for every recipe timed."""
    timed = [c for c in report["costs"] if c["time_saved"] is not None and c["flops_saved"] > 0]
    if not timed:
        return None, NOT_RUN
    shares = [(c["time_saved"] or 0.0) / c["flops_saved"] for c in timed]
    each = "; ".join(
        f"{c['name']} {scheme(c['backbone'])} {c['time_saved']:.1f} % of time for "
        f"{c['flops_saved']:.1f} % of FLOPs"
        for c in timed
    )
    return min(shares) >= _TIME_SHARE, f"In batches of 32: {each}."


CLAIMS: dict[str, Callable[[Report], Judged]] = {
    "INT8 quantization costs zero-shot accuracy at full depth": _collapse,
    "Quantization noise grows with depth": _noise_grows,
    "Early on, a head on patch tokens works where one on the class token does not": _shallow_heads,
    "Exits are right more often than full depth: they rescue more than they lose": _rescue,
    "What exits rescue is owed to quantization": _owed,
    "Images that exit early are more often right than those that stay": _selective,
    "The learned gate beats confidence alone": _learned_gate,
    "Dropping the exit with much noise (pathological layer pruning) helps": _pruning,
    "Heads taught by the float model beat heads taught by labels": _distillation,
    "LRA-EE beats patience (PABEE) at equal FLOPs": _beats(schema.PABEE),
    "LRA-EE beats the best static exit at equal FLOPs": _beats(schema.STATIC),
    "LRA-EE beats skipping of patches and blocks (AdaViT) at equal FLOPs": _beats(schema.ADAPTIVE),
    "SmoothQuant adds to what exits gain": _smoothing,
    "FLOPs saved become time saved": _time,
}
"""The claims and who judges them."""
