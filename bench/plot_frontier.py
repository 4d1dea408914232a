"""Draws what bench.exit_frontier measured: accuracy and agreement against FLOPs saved.

    python -m bench.plot_frontier results/exit_frontier.json docs/images/exit_frontier.png

Needs matplotlib: pip install 'lraee[bench]'.
"""

import json
from pathlib import Path
from typing import Any

import typer

LINES = {
    ("best", "learned"): ("LRA-EE, our recipe", "#1f6f4a", "o-"),
    ("best", "confidence"): ("confidence only", "#3b7dd8", "s--"),
    ("best", "patience"): ("PABEE (patience)", "#b06fc4", "^--"),
    ("best", "static"): ("best static exit", "#7a7a7a", "x:"),
    ("best", "agreement"): ("class-free", "#d98a1f", "v--"),
    ("paper", "learned"): ("LRA-EE as published", "#c23b3b", "D-"),
}
MEASURES = {"top1": "zero-shot top-1, %", "agreement": "same answer as float at full depth, %"}


def draw(content: dict[str, Any], out: Path) -> None:
    """Two panels, a line per recipe and gate, bars of one standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for (recipe, gate), (label, colour, style) in LINES.items():
            rows = [
                row
                for row in content["summary"]
                if (row["recipe"], row["gate"]) == (recipe, gate) and row["budget"] is not None
            ]
            rows.sort(key=lambda row: row["flops_saved"])
            axes.errorbar(
                [row["flops_saved"] for row in rows],
                [row[measure] for row in rows],
                yerr=[row[f"{measure}_std"] for row in rows],
                fmt=style, color=colour, label=label, markersize=4, linewidth=1.4, capsize=2,
            )  # fmt: skip
        axes.set_xlabel("FLOPs saved, heads and probes charged, %")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].axhline(content["full_depth_top1"], color="black", linewidth=0.8, linestyle=":")
    panels[0].annotate(
        "int8 at full depth", (0, content["full_depth_top1"]), fontsize=8, va="bottom"
    )
    panels[1].legend(fontsize=8, loc="upper right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main(measured: Path, out: Path) -> None:
    """Read the JSON, write the picture."""
    draw(json.loads(measured.read_text()), out)


if __name__ == "__main__":
    typer.run(main)
