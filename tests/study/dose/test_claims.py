"""Verdicts by dose, and the words that say in which range a claim holds."""

from lraee.study import findings
from lraee.study.dose import schema
from lraee.study.dose.claims import QUESTIONS, in_words
from lraee.study.dose.schema import Claim, Estimate, Verdict
from tests.dose_cells import DOSES, report

RESCUE = "Exits are right more often than full depth: they rescue more than they lose"


def claim(name: str, backbone: str = "paper") -> Claim:
    return next(c for c in report()["claims"] if (c["claim"], c["backbone"]) == (name, backbone))


def holds(name: str, backbone: str = "paper") -> list[bool | None]:
    return [verdict["holds"] for verdict in claim(name, backbone)["verdicts"]]


def test_every_question_is_a_claim_of_the_findings() -> None:
    assert {question.claim for question in QUESTIONS} <= set(findings.CLAIMS)
    assert len(report()["claims"]) == len(QUESTIONS) * len(schema.QUANTIZED)
    for each in report()["claims"]:
        assert [verdict["dose"] for verdict in each["verdicts"]] == list(DOSES)


def test_the_rescue_begins_where_noise_hurts() -> None:
    assert holds("INT8 quantization costs zero-shot accuracy at full depth")[1:] == [True, True]
    assert holds(RESCUE)[0] is not True and holds(RESCUE)[-1] is True
    assert holds("What exits rescue is owed to quantization")[-1] is True
    assert holds("What exits rescue is owed to quantization", "int8-calibrated")[0] is not True
    assert holds("Quantization noise grows with depth") == [True, True, True]
    assert holds("Images that exit early are more often right than those that stay")[0] is True


def test_what_was_not_measured_says_so() -> None:
    pruning = claim("Dropping the exit with much noise (pathological layer pruning) helps")
    assert [v["difference"] is None for v in pruning["verdicts"]] == [True, True, False]
    assert pruning["verdicts"][0]["note"] == "not measured"
    assert holds("LRA-EE beats the best static exit at equal FLOPs") == [None, None, None]


def verdict(dose: float, loss: float, is_true: bool | None) -> Verdict:
    difference: Estimate = {"value": loss, "error": 1.0, "seeds": [loss]}
    return {"dose": dose, "quantization_loss": loss, "difference": difference, "interval": None,
            "holds": is_true, "note": ""}  # fmt: skip


def test_words_name_the_range_and_the_loss_in_it() -> None:
    rows = [verdict(1, -0.04, False), verdict(8, 0.4, None), verdict(16, 2.0, None),
            verdict(32, 5.66, True)]  # fmt: skip
    assert in_words(rows) == (
        "Fails at dose 1 (loss 0.0 points); inconclusive at dose 8 to 16 (loss 0.4 to 2.0"
        " points); holds at dose 32 (loss 5.7 points)."
    )
    rows[0]["difference"] = None
    assert in_words(rows).startswith("Not measured at dose 1 (loss")
    assert in_words([]) == ""
