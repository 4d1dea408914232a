"""What the command line shows of reports: numbers, blanks and marks."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lraee.cli import tables
from lraee.exits.gate import Gate
from lraee.exits.plan import Plan
from tests.exits.small_exits import small_exits


def rows_of(table: Table) -> list[list[str]]:
    """Cells by row; columns hold them the other way round."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [[str(cell) for cell in cells] for cells in rows]


def shown(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=120, force_terminal=False).print(table)
    return out.getvalue()


FORM: dict[str, Any] = {
    "scheme": "float", "top1": 61.239, "top5": None, "agreement": 100.0, "error": 0.0123456,
    "neighbours": None, "neighbours_95": None, "neighbours_10": 97.5,
    "neighbours_10_95": (96.04, 98.96),
    "cosine_mean": 0.9999999, "cosine_p01": 0.99991234, "time_ms": 3.14159,
    "weight_bytes": 345_600_000, "flops_saved": None, "not_finite": 0,
}  # fmt: skip


def test_forms() -> None:
    other = {**FORM, "scheme": "exits learned", "top1": None, "flops_saved": 21.26, "not_finite": 2}
    table = tables.of_forms([FORM, other])
    assert [str(column.header) for column in table.columns] == ["", "float", "exits learned"]
    assert rows_of(table) == [
        ["top-1 %", "61.24", ""],
        ["top-1 as float's %", "100.00", "100.00"],
        ["relative error", "0.0123", "0.0123"],
        ["ten nearest as float's %", "97.50", "97.50"],
        ["  95 % interval", "96.0 to 99.0", "96.0 to 99.0"],
        ["cosine with float's, mean", "1.00000", "1.00000"],
        ["cosine, 1st percentile", "0.99991", "0.99991"],
        ["ms per photo", "3.14", "3.14"],
        ["image tower, MB", "345.60", "345.60"],
        ["FLOPs saved, %", "", "21.3"],
        ["photos not finite", "0", "2"],
    ]  # top-5 and nearest photo: no form has them


def test_retrieval() -> None:
    row = {"scheme": "int8", "recall_1": 98.765, "recall_5": 100.0, "recall_10": 100.0}
    row |= {f"class_{k}": None for k in (1, 5, 10)}
    assert rows_of(tables.of_retrieval([row])) == [
        ["float's first in first 1, %", "98.77"],
        ["float's first in first 5, %", "100.00"],
        ["float's first in first 10, %", "100.00"],
    ]


def test_answers() -> None:
    row: dict[str, Any] = {"photo": "a.jpg", "exit_block": 7}
    for form, name, share in (("float", "cat", 0.5), ("int8", "cat", 0.496), ("exits", "dog", 1.0)):
        row |= {f"{form}_name": name, f"{form}_share": share}
    table = tables.of_answers([row])
    assert rows_of(table) == [["a.jpg", "cat 50 %", "cat 50 %", "dog 100 %", "block 7"]]
    styles = [getattr(cell, "style", "") for column in table.columns for cell in column.cells]
    assert styles == ["", "", "", "red", ""]


@pytest.mark.parametrize("name", ["[bold]x.jpg", "a[/b].jpg", "[1].jpg", ":cat:.jpg"])
def test_names_are_shown_as_they_are(name: str) -> None:
    """Brackets are markup to rich: a photo's name must not vanish, nor end the command."""
    row: dict[str, Any] = {"photo": name, "exit_block": 7}
    for form in ("float", "int8", "exits"):
        row |= {f"{form}_name": f"{form} {name}", f"{form}_share": 0.5}
    assert shown(tables.of_answers([row])).count(name) == 4
    assert name in shown(tables.of_forms([{**FORM, "scheme": name}]))
    exits = small_exits()
    exits = replace(exits, plans={name: exits.plan}, chosen=name)
    row = {**card()["plans"]["all"]}
    assert name in shown(tables.of_plans(replace(exits, card=card(plans={name: row}))))


def card(**changes: Any) -> dict[str, Any]:
    return {
        "images": {"heads": 700, "gate": 100, "thresholds": 200},
        "candidates": [5, 6, 7], "dropped": [], "time": None,
        "goal": {"budget": 0.8, "epsilon": None, "delta": 0.05},
        "plans": {
            "b = 0.5": {
                "gate": "learned", "exits": [5, 7], "share": [0.5, 0.26, 0.24],
                "flops_saved": 0.2149, "gain": 0.98765, "gain_at_full_depth": 1.0,
            },
            "all": {
                "gate": "learned", "exits": [], "share": [1.0], "flops_saved": 0.0, "gain": 1.0,
                "gain_at_full_depth": 1.0,
            },
        },
        **changes,
    }  # fmt: skip


def test_plans() -> None:
    exits = replace(small_exits(), card=card())
    assert rows_of(tables.of_plans(exits)) == [
        ["b = 0.5 (chosen)", "5 7", "50 26", "21.5", "98.77", "100.00"],
        ["all", "none", "", "0.0", "100.00", "100.00"],
    ]
    other = replace(exits, chosen="all", plans={"all": Plan((), Gate("learned", (), ()))})
    assert rows_of(tables.of_plans(other))[1][0] == "all (chosen)"


def test_card_lines() -> None:
    assert dict(tables.card_lines(card())) == {
        "images": "700 for heads, 100 for gate, 200 for thresholds",
        "candidates": "after 5, 6, 7; noise drops none",
        "goal": "at most 80 % of full depth's FLOPs",
    }
    plans = card()["plans"]
    plans["all"]["is_certified"], plans["b = 0.5"]["is_certified"] = False, True
    result = dict(
        tables.card_lines(
            card(
                dropped=[8, 9], plans=plans, goal={"budget": None, "epsilon": 0.01, "delta": 0.05},
                time={"probe_us": [12.0, 60.0], "tower_us": [1000.0, 20_000.0]},
            )
        )
    )  # fmt: skip
    assert result["candidates"] == "after 5, 6, 7; noise drops 8, 9"
    assert result["goal"] == "loss of at most 0.01 with probability 0.95"
    assert result["not proven"].startswith("all: too few images for this loss")
    assert result["a probe takes"] == "1.20 %, 0.30 % of the tower's time at batch 1, 32"
