"""The tables of a dose study, as text."""

from lraee.study.dose import schema
from lraee.study.dose.schema import Claim, DoseReport, Estimate, Rescue, SystemRow, Verdict
from lraee.study.page.formatting import NOTHING, backbone, chance, figure, interval, spread
from lraee.study.page.tables import Table

MARKS = {True: "\u2713 holds", False: "\u2717 fails", None: "? open"}


def dose_name(dose: float) -> str:
    """As tables name a dose."""
    return f"{dose:g}"


def estimated(value: Estimate) -> str:
    """Mean, and two standard errors."""
    return f"{figure(value['value'])} \u00b1 {figure(2.0 * value['error'])}"


def of_verdicts(report: DoseReport, name: str) -> Table:
    """Claims of one backbone by dose, a verdict a cell; the header has the loss at each dose."""
    claims = [claim for claim in report["claims"] if claim["backbone"] == name]
    losses = {v["dose"]: v["quantization_loss"] for claim in claims[:1] for v in claim["verdicts"]}
    header = [
        "claim; full depth loses, points",
        *(f"dose {dose_name(dose)}; {figure(loss, 1)}" for dose, loss in losses.items()),
    ]
    rows = [[titled(claim), *(_mark(v) for v in claim["verdicts"])] for claim in claims]
    return Table(f"Verdicts by dose, {backbone(name)}", header, rows)


def titled(claim: Claim) -> str:
    """The claim, with the recipe where it is judged on one."""
    return f"{claim['claim']} ({claim['recipe']})" if claim["recipe"] else claim["claim"]


def _mark(verdict: Verdict) -> str:
    return NOTHING if verdict["difference"] is None else MARKS[verdict["holds"]]


def of_differences(report: DoseReport) -> list[Table]:
    """What each verdict rests on, a folded table per backbone."""
    header = ("claim", "dose", "loss at full depth", "difference", "interval, corrected",
              "each seed", "verdict", "note")  # fmt: skip
    tables = []
    for name in schema.QUANTIZED:
        rows = [
            [
                titled(claim), dose_name(v["dose"]), figure(v["quantization_loss"]),
                figure(v["difference"]["value"]) if v["difference"] else NOTHING,
                interval(*v["interval"]) if v["interval"] else NOTHING,
                ", ".join(figure(each) for each in v["difference"]["seeds"])
                if v["difference"] else NOTHING,
                _mark(v), v["note"],
            ]
            for claim in report["claims"] if claim["backbone"] == name
            for v in claim["verdicts"]
        ]  # fmt: skip
        caption = f"Differences behind the verdicts, {backbone(name)}"
        tables.append(Table(caption, header, rows, is_folded=True))
    return tables


def of_curve(report: DoseReport) -> Table:
    """Every point of the curve."""
    header = ("backbone", "recipe", "dose", "lost to quantization", "rescued \u2212 lost",
              "above float", "still below float", "exited, %")  # fmt: skip
    rows = [
        [
            backbone(row["backbone"]), row["recipe"], _dose_of(row),
            estimated(row["quantization_loss"]), estimated(row["margin"]), estimated(row["owed"]),
            estimated(row["rest"]), spread(row["exited_share"]),
        ]
        for row in report["rescue"]
    ]  # fmt: skip
    return Table("The curve in points of top-1, two standard errors either way", header, rows)


def _dose_of(row: Rescue | SystemRow) -> str:
    return "all" if row["backbone"] == "float" else dose_name(row["dose"])


def of_quadrants(report: DoseReport) -> Table:
    """Counts, McNemar's test and selectivity."""
    header = ("backbone", "recipe", "dose", "both right", "rescue", "loss", "neither",
              "McNemar p by seed", "top-1 of exited, %", "top-1 of the rest, %")  # fmt: skip
    rows = [
        [
            backbone(row["backbone"]), row["recipe"], _dose_of(row), f"{row['both']:,}",
            f"{row['rescue']:,}", f"{row['loss']:,}", f"{row['neither']:,}",
            ", ".join(chance(p) for p in row["mcnemar_p"]), figure(row["exited_top1"]),
            figure(row["stayed_top1"]),
        ]
        for row in report["rescue"]
    ]  # fmt: skip
    caption = "Right with exits and at full depth: photos, all seeds together"
    return Table(caption, header, rows, is_folded=True)


def of_systems(report: DoseReport) -> list[Table]:
    """Top-1 of every system by dose, and what it saves, a table per backbone."""
    tables = []
    for name in schema.QUANTIZED:
        own = [row for row in report["systems"] if row["backbone"] in ("float", name)]
        columns = [("float", 1.0), *((name, dose) for dose in report["doses"])]
        top1 = {(row["name"], row["backbone"], row["dose"]): row for row in own}
        header = ("system", "float", *(f"dose {dose_name(dose)}" for dose in report["doses"]))
        rows = [
            [system, *(_system(top1.get((system, *column))) for column in columns)]
            for system in dict.fromkeys(row["name"] for row in own)
        ]
        caption = f"Top-1 in percent (FLOPs saved), {backbone(name)}"
        tables.append(Table(caption, header, rows))
    return tables


def _system(row: SystemRow | None) -> str:
    if row is None:
        return NOTHING
    return f"{spread(row['top1'])} ({figure(row['flops_saved']['mean'], 1)})"


def of_noise(report: DoseReport) -> list[Table]:
    """Every figure of every block, a folded table per backbone and dose."""
    header = ("block", "natural step", "quantization error", "NSR, %", "cosine", "INR")
    return [
        Table(
            f"Noise of {backbone(noise['backbone'])} at dose {dose_name(noise['dose'])}", header,
            [
                [
                    str(b["block"]), figure(b["natural_step"]), figure(b["quantization_error"], 3),
                    figure(100.0 * b["nsr"]), figure(b["cosine"], 5), figure(b["inr"], 1),
                ]
                for b in noise["blocks"]
            ],
            is_folded=True,
        )
        for noise in report["noise"]
    ]  # fmt: skip


def of_float(report: DoseReport) -> list[Table]:
    """Whether float answers the same with each dose in."""
    header = ("dose", "seed", "same answers", "of photos", "largest relative error")
    rows = [
        [
            dose_name(k["dose"]), str(k["seed"]), f"{k['same_answers']:,}", f"{k['photos']:,}",
            f"{k['largest_error']:.1e}",
        ]
        for k in report["kept"]
    ]  # fmt: skip
    return [Table("The float model with the dose in", header, rows, is_folded=True)] if rows else []
