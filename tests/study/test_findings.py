"""Claims beside data: each verdict flips with the data, and says so in words with the numbers."""

import math
from typing import Any

import pytest

from lraee.study import evidence, schema
from lraee.study.evidence import Difference
from lraee.study.findings import CLAIMS, NOT_RUN, findings
from lraee.study.schema import Report
from tests.study_report import quadrants, report, row, spread, without_parts

VERDICTS = {
    "quantization costs": True, "noise grows": True, "patch tokens works": True,
    "rescue more": False, "owed to": None, "exit early": True, "learned gate": True,
    "pathological": True, "taught by": True, "PABEE": True, "static": None, "AdaViT": True,
    "SmoothQuant": True, "time saved": True,
}  # fmt: skip


def verdict(made: Report, part: str) -> tuple[bool | None, str]:
    (result,) = [f for f in findings(made) if part in f["claim"]]
    return result["holds"], result["words"]


@pytest.mark.parametrize(("part", "holds"), VERDICTS.items())
def test_made_up_report(part: str, holds: bool | None) -> None:
    assert verdict(report(), part)[0] is holds


def test_every_claim_has_a_verdict_here() -> None:
    assert len(CLAIMS) == len(VERDICTS)


def test_nothing_run_tells_nothing() -> None:
    assert {(f["holds"], f["words"]) for f in findings(without_parts())} == {(None, NOT_RUN)}


def test_findings_are_pure() -> None:
    built = report()
    assert findings(built) == findings(built | {"findings": []})  # type: ignore[arg-type]
    assert built == report()


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.01, 2, True), (-2, -0.01, False), (-0.49, 0.49, False), (-0.51, 0.4, None), (0, 3, None)],
)
def test_rule(low: float, high: float, holds: bool | None) -> None:
    assert Difference((low + high) / 2, low, high).holds is holds


def test_difference_by_hand() -> None:
    """4 % of 1,600 photos change: 2 x 100 sqrt(0.04 / 1600) = 1 point; seeds 2 x 0.3 / sqrt 3."""
    exact, changed = row("a", "float", 60.0, agreement=100.0), row("b", "int8", 58.0, agreement=96)
    result = evidence.of_rows(exact, changed, photos=1600)
    assert (result.points, result.low, result.high) == pytest.approx((2.0, 1.0, 3.0))
    seeds = {**changed, "top1": spread(58.0, 0.3), "seeds": 3}
    result = evidence.of_rows(exact, seeds, photos=1600)  # type: ignore[arg-type]
    assert result.points - result.low == pytest.approx(math.hypot(1.0, 2 * 0.3 / math.sqrt(3)))


def test_rank_correlation_by_hand() -> None:
    """Distances of ranks 1, 1, 1, 1: 1 - 6 x 4 / (4 x 15) = 0.6; ties share their rank."""
    assert evidence.rank_correlation([2, 1, 4, 3]) == pytest.approx(0.6)
    assert evidence.rank_correlation([1, 2, 3, 9]) == pytest.approx(1.0)
    assert evidence.rank_correlation([5, 5, 5]) == 0.0


def test_collapse_is_not_seen_where_there_is_none() -> None:
    built = report()
    for each in built["main"]:
        if each["name"] == schema.FULL_DEPTH:
            each |= {"top1": spread(62.0), "agreement": spread(99.9)}
    assert verdict(built, "quantization costs")[0] is False


def test_noise_that_falls_fails() -> None:
    built = report()
    built["noise"] = {"paper": built["noise"]["paper"][::-1]}
    holds, words = verdict(built, "noise grows")
    assert holds is False and "from 42.0 % in the first third" in words


@pytest.mark.parametrize(
    ("rescue", "loss", "holds"), [(900, 300, True), (300, 900, False), (420, 400, None)]
)
def test_rescue_follows_the_margin(rescue: int, loss: int, holds: bool | None) -> None:
    built = report()
    built["quadrants"] = [quadrants("paper", schema.PUBLISHED, rescue, loss)]
    assert verdict(built, "rescue more")[0] is holds


def test_rescue_needs_mcnemar_too() -> None:
    built = report()
    part = quadrants("paper", schema.PUBLISHED, 900, 300)
    built["quadrants"] = [{**part, "mcnemar_p": 0.06}]  # type: ignore[typeddict-item]
    holds, words = verdict(built, "rescue more")
    assert holds is None and "McNemar p = 0.06" in words


def test_margin_by_hand() -> None:
    """4 % of 1,600 photos change, a quarter of them to the worse: 2 points, 2 x 100 sqrt(...)."""
    part = quadrants("paper", schema.BEST, 144, 48) | {"images": 4800, "margin": spread(2.0, 0.3)}
    result = evidence.of_margin(part, seeds=3, photos=1600)  # type: ignore[arg-type]
    over_photos = 200 * math.sqrt((0.04 - 0.02**2) / 1600)
    assert result.points == 2.0
    assert result.high - 2.0 == pytest.approx(math.hypot(over_photos, 0.6 / math.sqrt(3)))


def test_nothing_rescued_is_owed_to_nothing() -> None:
    built = report()
    built["owed"][0] |= {"margin": -2.0, "float_margin": -4.0, "difference": 2.0,
                        "interval": (1.0, 3.0)}  # fmt: skip
    holds, words = verdict(built, "owed to")
    assert holds is None and "On balance nothing is rescued" in words
    built["owed"][0] |= {"margin": 4.0, "float_margin": 2.0}
    assert verdict(built, "owed to")[0] is True


def test_judged_where_the_paper_makes_the_claim() -> None:
    """The order in the report does not matter: the paper's backbone and recipe decide."""
    built = report()
    built["quadrants"] = [
        quadrants("float", schema.BEST, 300, 900),
        quadrants("paper", schema.BEST, 300, 900),
        quadrants("paper", schema.PUBLISHED, 900, 300),
    ]
    assert verdict(built, "rescue more")[0] is True


def test_gates_that_swap_swap_the_verdict() -> None:
    built: Any = report()
    for sweep in built["sweeps"]:
        sweep["learned"], sweep["confidence"] = sweep["confidence"], sweep["learned"]
    holds, words = verdict(built, "learned gate")
    assert holds is False and "\u22120.84 points" in words


def test_pruning_that_drops_nothing_cannot_be_judged() -> None:
    built = report()
    built["pruned"][0]["is_dropped_by_rule"] = False
    holds, words = verdict(built, "pathological")
    assert holds is None and "drops no exit here" in words


def test_rival_is_met_at_its_own_saving() -> None:
    """12 % lies between the points at 10 % and 15 %, of 61.9 % each."""
    assert "there 61.90 %: +3.00 points" in verdict(report(), "PABEE")[1]
    built = report()
    for each in built["main"]:
        if each["name"] == schema.PABEE:
            each["flops_saved"] = spread(80.0)
    holds, words = verdict(built, "PABEE")
    assert holds is None and "was not measured" in words


def test_time_that_lags_behind_fails() -> None:
    built = report()
    built["costs"][0]["time_saved"] = 9.4
    assert verdict(built, "time saved")[0] is False
