"""Draws what bench.search_exits measured: the nearest photo against FLOPs saved.

    python -m bench.plot_search results/search_exits.json docs/images/search_exits.png

Needs matplotlib: pip install 'lraee[bench]'.
"""

import json
from pathlib import Path
from typing import Any

import typer

LINES = {
    "class token alone, fitted": ("class token alone, keys and values fitted", "#1f6f4a", "o-"),
    "class token alone": ("class token alone", "#3b7dd8", "s--"),
    "trained head": ("trained head", "#c23b3b", "D--"),
}
MEASURES = {"as_float": "nearest photo is float's, %", "float_among_5": "among the first 5, %"}


def draw(content: dict[str, Any], out: Path) -> None:
    """Two panels, a line for each way to leave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for way, (label, colour, style) in LINES.items():
            rows = [row for row in content["rows"] if row["way"] == way]
            if not rows:
                continue
            rows.sort(key=lambda row: row["flops_saved"])
            points = [[row[key] for row in rows] for key in ("flops_saved", measure)]
            axes.plot(*points, style, color=colour, label=label, markersize=4, linewidth=1.4)
        full = next(row for row in content["rows"] if row["flops_saved"] == 0)
        axes.axhline(full[measure], color="black", linewidth=0.8, linestyle=":")
        axes.annotate("int8 at full depth", (20, full[measure]), fontsize=8, va="bottom")
        axes.set_xlabel("FLOPs saved, %")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="lower left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main(measured: Path, out: Path) -> None:
    """Read the JSON, write the picture."""
    draw(json.loads(measured.read_text()), out)


if __name__ == "__main__":
    typer.run(main)
