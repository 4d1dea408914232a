"""Charts as data, drawn by matplotlib: as SVG in the page's own colours and font, or as a PNG."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INK, GRID = "#000000", "#b0b0b0"
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
"""Okabe and Ito's colours, which colour-blind people tell apart; each line has a mark too."""

_VARIABLES = {
    INK: "ink", GRID: "grid", BLUE: "blue", RED: "red", GREEN: "green", PURPLE: "purple",
    ORANGE: "orange",
}  # fmt: skip
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: searched, read aloud, in the page's font
    "svg.hashsalt": "lraee",  # the same report gives the same bytes
    "text.parse_math": False,  # names in a report are text, not formulas
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}
_SIZE = (5.5, 3.9)  # inches, of 72 units in the SVG
_WIDE = (9.5, 4.6)
_TITLE = 26.0  # units above a file's chart, for its title
_STYLE = """<style>
svg { --paper: #fcfcfa; --ink: #1a1a18; --grid: #c4c4bd; --blue: #0072b2; --red: #c24f00;
  --green: #00795a; --purple: #a8548a; --orange: #9a6700; fill: var(--ink);
  font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.title { font-size: 13px; font-weight: 600; text-anchor: middle; }
@media (prefers-color-scheme: dark) { svg { --paper: #161614; --ink: #ecece6; --grid: #4d4d46;
  --blue: #56b4e9; --red: #f08a3c; --green: #2fc29a; --purple: #e29cc6; --orange: #e6b24a; } }
</style>"""
"""The colours of page.css."""


@dataclass(frozen=True)
class Look:
    """Colour, and matplotlib's mark and line, which tell lines apart without colour."""

    colour: str
    style: str


@dataclass(frozen=True)
class Line:
    """One line; `errors` are half the length of its bars."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Args:
      name: unique in the page.
      title: what is shown, also read aloud.
      level: height and label of a horizontal line to compare with.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None
    is_log: bool = False


@dataclass(frozen=True)
class Interval:
    """A value with its interval, beside a label."""

    label: str
    look: Look
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """Values with intervals, one below the other; a line marks 0 where `has_zero`."""

    name: str
    title: str
    x_label: str
    rows: Sequence[Interval]
    has_zero: bool = False


@dataclass(frozen=True)
class Point:
    """A place with half the length of its bars, and a label beside it."""

    x: float
    y: float
    x_error: float
    y_error: float
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """Points joined in their order."""

    label: str
    look: Look
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """Axes of their own beside others of the same scales; `level` is a line y = c and its name."""

    title: str
    curves: Sequence[Curve]
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Curves:
    """Panels side by side, one legend; `zero` names the line y = 0, `diagonal` that of y = x."""

    name: str
    title: str
    x_label: str
    y_label: str
    panels: Sequence[Panel]
    zero: str
    diagonal: str


Drawing = Chart | Intervals | Curves


def svg(chart: Drawing) -> str:
    """The chart as an SVG element for inside HTML, with a label; its text is escaped.

    Raises: ImportError without matplotlib.
    """
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with _matplotlib():
        _figure(chart).savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inlined(out.getvalue(), chart)


def svg_file(chart: Drawing) -> str:
    """The chart as an SVG file with its title, on a ground of its own, light or dark as the viewer.

    Raises: ImportError without matplotlib.
    """
    text = svg(chart)
    start = text.index("<svg ")
    end = text.index(">", start) + 1
    element = re.sub(r' class="plot"| aria-labelledby="[^"]*"', "", text[start:end])
    match = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', element)
    assert match is not None
    width, height = (float(each) for each in match.groups())
    view = f'viewBox="0 {-_TITLE:g} {width:g} {height + _TITLE:g}"'
    element = element.replace(match[0], f'{view} width="{width:g}" height="{height + _TITLE:g}"')
    title = html.escape(chart.title)
    ground = f'<rect y="{-_TITLE:g}" width="100%" height="100%" rx="6" fill="var(--paper)"/>'
    heading = f'<text x="{width / 2:g}" y="-9" class="title">{title}</text>'
    return f"{element}<title>{title}</title>{_STYLE}{ground}{heading}{text[end:]}\n"


def png(chart: Drawing, *, dpi: int = 110) -> bytes:
    """The chart as a PNG on white.

    Raises: ImportError without matplotlib.
    """
    out = io.BytesIO()
    with _matplotlib():
        drawn = _figure(chart)
        drawn.suptitle(chart.title, fontsize=10, y=1.02)
        nothing = {"Software": None}
        drawn.savefig(out, format="png", dpi=dpi, bbox_inches="tight", metadata=nothing)
    return out.getvalue()


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Draws with our settings inside."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"report: matplotlib must be installed: pip install 'lraee[report]' ({error})"
        ) from error
    with matplotlib.rc_context(_SETTINGS):
        yield


def _figure(chart: Drawing) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=_SIZE)
    if isinstance(chart, Chart):
        _draw_lines(drawn, chart)
    elif isinstance(chart, Curves):
        drawn.set_size_inches(_WIDE)
        _draw_panels(drawn, chart)
    else:
        drawn.set_size_inches(_SIZE[0], 0.7 + 0.4 * max(len(chart.rows), 1))
        _draw_intervals(drawn, chart)
    return drawn


def _draw_lines(drawn: Any, chart: Chart) -> None:
    axes = _axes(drawn, left=0.14, below=0.85 + 0.2 * ((len(chart.lines) + 1) // 2))
    for line in chart.lines:
        axes.errorbar(
            line.x, line.y, yerr=line.errors, fmt=line.look.style, color=line.look.colour,
            label=line.label, markersize=4.5, linewidth=1.5, capsize=2,
        )  # fmt: skip
    if chart.level:
        axes.axhline(chart.level[0], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            chart.level[1], (0.0, chart.level[0]), xycoords=("axes fraction", "data"),
            xytext=(3, 3), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    if chart.is_log and all(y > 0 for line in chart.lines for y in line.y):
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(_locator("LogLocator", subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
    if chart.x_label == "block":
        axes.xaxis.set_major_locator(_locator("MaxNLocator", integer=True))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(color=GRID, linewidth=0.4)
    drawn.legend(loc="lower center", ncols=2, frameon=False, fontsize=10)


def _draw_intervals(drawn: Any, chart: Intervals) -> None:
    longest = max(len(line) for row in chart.rows for line in row.label.split("\n"))
    axes = _axes(drawn, left=min(0.04 + 0.0155 * longest, 0.5), below=0.55)
    for place, row in enumerate(chart.rows):
        # An interval of one seed need not hold the mean over seeds: drawn as it is.
        axes.plot([row.low, row.high], [place, place], color=row.look.colour, linewidth=1.5)
        axes.plot([row.value], [place], row.look.style[0], color=row.look.colour, markersize=6)
    if chart.has_zero:
        axes.axvline(0.0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(chart.rows)), [row.label for row in chart.rows], fontsize=10)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(_locator("MaxNLocator", nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(chart.x_label)
    axes.grid(axis="x", color=GRID, linewidth=0.4)


def _draw_panels(drawn: Any, chart: Curves) -> None:
    left, below, between = 0.075, 0.21, 0.035
    width = (0.985 - left - between * (len(chart.panels) - 1)) / max(len(chart.panels), 1)
    first = None
    for place, panel in enumerate(chart.panels):
        box = (left + place * (width + between), below, width, 0.93 - below)
        axes = drawn.add_axes(box, sharex=first, sharey=first)
        first = first or axes
        for curve in panel.curves:
            x, y = [p.x for p in curve.points], [p.y for p in curve.points]
            axes.errorbar(
                x, y, xerr=[p.x_error for p in curve.points], fmt=curve.look.style,
                yerr=[p.y_error for p in curve.points], color=curve.look.colour, label=curve.label,
                markersize=5, linewidth=1.5, elinewidth=0.8, capsize=1.5,
            )  # fmt: skip
            for point in curve.points:
                axes.annotate(
                    point.label, (point.x, point.y), xytext=(5, -11), textcoords="offset points",
                    fontsize=9, color=curve.look.colour,
                )  # fmt: skip
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(chart.x_label, fontsize=10)
        axes.grid(color=GRID, linewidth=0.4)
        if place:
            axes.tick_params(labelleft=False)
    if first is not None:
        first.set_ylabel(chart.y_label, fontsize=10)
        _draw_references(drawn, chart)
        handles, labels = first.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)


def _draw_references(drawn: Any, chart: Curves) -> None:
    """y = 0 and y = x within the limits that the points need."""
    levels = [panel.level[0] for panel in chart.panels if panel.level]
    (left, right), (low, high) = drawn.axes[0].get_xlim(), drawn.axes[0].get_ylim()
    space = 0.06 * (high - low)
    low, high = min([low, *(y - space for y in levels)]), max([high, *(y + space for y in levels)])
    for axes, panel in zip(drawn.axes, chart.panels, strict=True):
        for y, name in [(0.0, chart.zero), *([panel.level] if panel.level else [])]:
            is_below = name == chart.zero and any(abs(level) < 2 * space for level in levels)
            axes.axhline(y, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(
                name, (1.0, y), xycoords=("axes fraction", "data"),
                xytext=(-3, -11 if is_below else 3), textcoords="offset points", fontsize=9,
                ha="right",
            )  # fmt: skip
        end = min(right, high)
        axes.plot([0.0, end], [0.0, end], color=INK, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(
            chart.diagonal, (0.6 * end, 0.6 * end), xytext=(-6, 2), textcoords="offset points",
            fontsize=9, ha="right",
        )  # fmt: skip
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)


def _axes(drawn: Any, *, left: float, below: float) -> Any:
    """Axes placed by hand, a share from the left and inches from below.

    A layout engine takes four times as long as the drawing.
    """
    height = drawn.get_size_inches()[1]
    return drawn.add_axes((left, below / height, 0.97 - left, 1.0 - (below + 0.1) / height))


def _locator(kind: str, **options: Any) -> Any:
    from matplotlib import ticker

    return getattr(ticker, kind)(**options)


def _inlined(text: str, chart: Drawing) -> str:
    """matplotlib's file as an element: ids of its own, the page's colours and font, a label."""
    text = text[text.index("<svg ") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"', "", text)
    for start in (' id="', 'href="#', "url(#"):
        text = text.replace(start, f"{start}{chart.name}-")
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    label = f'role="img" aria-labelledby="{chart.name}-title" class="plot"'
    return re.sub(
        r'<svg (.*?)width="[\d.]+pt" height="[\d.]+pt"', rf"<svg {label} \1", text, count=1
    ).strip()
