"""The seven parts of the page: what each shows, in which words, with which tables and charts."""

from collections.abc import Sequence
from dataclasses import dataclass

from lraee.study.page import plots, tables
from lraee.study.page.charts import Drawing
from lraee.study.page.tables import Table
from lraee.study.schema import Example, Report


@dataclass(frozen=True)
class Section:
    """One thing shown: a sentence, charts, tables, photos. Empty if it was not run."""

    name: str
    title: str
    words: str
    charts: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    photos: Sequence[Example] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing was run."""
        return not (self.charts or self.tables or self.photos)


@dataclass(frozen=True)
class Part:
    """A numbered part; `terms` are explained where they first come up."""

    number: int
    title: str
    terms: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def parts(report: Report) -> list[Part]:
    """All seven, in order."""
    return [
        _noise(report), _lens(report), _main(report), _ablations(report), _rescue(report),
        _drift(report), _costs(report),
    ]  # fmt: skip


def _noise(report: Report) -> Part:
    terms = (
        ("Natural step", "how far a block moves the tokens of an image, in float."),
        ("NSR", "noise-to-signal ratio: how far quantization moves them, over the natural step."),
        ("INR", "information-to-noise ratio: squared norm of the mean token over the variance "
         "of the noise. The published rule (pathological layer pruning) drops an exit whose INR "
         "is below half the mean of the candidates."),
    )  # fmt: skip
    words = "How much noise INT8 leaves in the tokens after each block, and which exits it spoils."
    section = Section(
        "noise", "Noise by depth", words, plots.of_noise(report), tables.of_noise(report)
    )
    return Part(1, "Noise", terms, [section])


def _lens(report: Report) -> Part:
    terms = (
        ("SSA head", "a small network on the mean of the patch tokens (spatio-semantic "
         "aggregation), taught to give the tower's embedding."),
        ("Class-token head", "the same on the class token."),
        ("Our head", "the same on both together."),
        ("Own projection", "the tower's last layer norm and projection, applied early, "
         "nothing trained."),
    )  # fmt: skip
    words = "What one block's tokens know of the class; bars show one standard deviation."
    section = Section(
        "lens", "Top-1 by depth", words, plots.of_lens(report), tables.of_lens(report)
    )
    return Part(2, "Lens", terms, [section])


def _main(report: Report) -> Part:
    terms = (
        ("Top-1", "share of photos whose nearest class text is the right one."),
        ("As float", "share of photos with the same answer as the float model at full depth."),
        ("FLOPs saved", "share of the full tower's work left out; heads and gates are charged."),
    )
    words = (
        "Every system on the same photos, mean and standard deviation over seeds; then the "
        "published rows."
    )
    section = Section("main", "All systems", words, tables=tables.of_main(report))
    return Part(3, "Main table", terms, [section])


def _ablations(report: Report) -> Part:
    terms = (
        ("Labels, distilled", "heads taught by true classes, or by the float model's embedding."),
        ("Gate", "decides at each exit whether an image exits: learned from confidence, margin "
         "and the spread of the tokens, or confidence alone."),
    )  # fmt: skip
    sections = [
        Section("factorial", "Factorial", "What the head, the teaching and the exits each add; "
                "bars show one standard deviation.", plots.of_factorial(report),
                tables.of_factorial(report)),
        Section("gates", "Gates", "Both gates on the same heads, one threshold for all exits, "
                "swept; means over seeds.", plots.of_sweeps(report)),
        Section("pruned", "Pruned exit", "The same recipe with and without the exit that has the "
                "lowest INR.", tables=tables.of_pruned(report)),
        Section("shares", "Exit shares", "How many images exit where, and how often those are "
                "right.", tables=tables.of_shares(report)),
    ]  # fmt: skip
    return Part(4, "What each piece adds", terms, sections)


def _rescue(report: Report) -> Part:
    terms = (
        ("Rescue, loss", "photos that are right only with exits, or only at full depth; the "
         "margin is their difference, in points of top-1."),
        ("McNemar's test", "how likely such a difference is if rescue and loss were equally "
         "likely. Interval and test are of the first seed, the margin of all."),
        ("AUROC", "how well the gate's score tells right answers from wrong: 1 always, 0.5 "
         "never."),
        ("Float control", "the same exits on the model that was never quantized: what they "
         "rescue there is not owed to quantization."),
    )  # fmt: skip
    sections = [
        Section("quadrants", "Four quadrants", "Which photos exits make right, and which wrong.",
                plots.of_margins(report),
                tables.of_quadrants(report)),
        Section("owed", "Owed to quantization", "The margin on a quantized backbone minus that "
                "of the float control, on the same photos.",
                plots.of_owed(report), tables.of_owed(report)),
        Section("classes", "By class", "Which classes gain and which lose, first seed.",
                tables=tables.of_classes(report)),
        Section("gallery", "Photos", "What each exit says of rescued and lost photos; the answer "
                "that was taken is marked \u25b8.", photos=report["examples"]),
    ]  # fmt: skip
    return Part(5, "Rescue", terms, sections)


def _drift(report: Report) -> Part:
    terms = (
        ("Angle", "between the float and the quantized embedding of the same photo."),
        ("Margin", "how much nearer the nearest class text is than the next, as a cosine, "
         "in float: a turn flips the answer where it outweighs the margin."),
        ("Rank correlation", "of angle / margin with being flipped: 1 would tell all flips."),
    )  # fmt: skip
    words = "How far quantization turns embeddings, and whose answers that flips."
    section = Section(
        "drift-part", "Drift by depth", words, plots.of_drift(report), tables.of_drift(report)
    )
    return Part(6, "Drift", terms, [section])


def _costs(report: Report) -> Part:
    terms = (("Budget", "the share of the full tower's FLOPs that a plan may use on average."),)
    sections = [
        Section("costs", "FLOPs and time", "What exits save in work, and in time in batches of "
                "32.", tables=tables.of_costs(report)),
        Section("frontier", "Frontier", "What each system keeps at each saving; bars show one "
                "standard deviation.", plots.of_frontier(report), tables.of_frontier(report)),
    ]  # fmt: skip
    return Part(7, "Cost and frontier", terms, sections)
