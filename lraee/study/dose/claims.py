"""The paper's claims at every dose: in which range of quantization noise each of them holds.

A claim is judged as lraee.study.findings does, on the recipe as published where it names none. All
claims and doses of one backbone are one family of Holm's correction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lraee.study import evidence
from lraee.study import schema as study_schema
from lraee.study.dose import cells, schema
from lraee.study.dose.holm import Comparison, verdicts
from lraee.study.dose.response import Response
from lraee.study.dose.schema import Claim, Estimate, Verdict

POINTS = "points"
CORRELATION = "rank correlation"
NOT_MEASURED = "not measured"
PUBLISHED, BEST = study_schema.PUBLISHED, study_schema.BEST
_MCNEMAR = 0.05

Difference = Callable[[Response, str, float], Estimate | None]
Objection = Callable[[Response, str, float], str]
"""Why a difference above 0 does not do; empty where it does."""


@dataclass(frozen=True)
class Question:
    """What decides a claim.

    Args:
      claim: its words, as in lraee.study.findings.
      recipe: of exits that it is judged on; empty where none counts.
      difference: that the claim says is above 0.
      unit: of the difference; within half a point of 0 is nothing, any correlation counts.
      objection: see Objection.
    """

    claim: str
    recipe: str
    difference: Difference
    unit: str = POINTS
    objection: Objection = lambda response, backbone, dose: ""


def claims(response: Response) -> list[Claim]:
    """Every question on every quantized backbone, the paper's first."""
    return [claim for name in schema.QUANTIZED for claim in _of_backbone(response, name)]


def _of_backbone(response: Response, backbone: str) -> list[Claim]:
    keys = [(question, dose) for question in QUESTIONS for dose in response.doses]
    differences = [question.difference(response, backbone, dose) for question, dose in keys]
    family = [
        Comparison(d["value"], d["error"], evidence.MATTERS if q.unit == POINTS else 0.0)
        for (q, _), d in zip(keys, differences, strict=True)
        if d is not None
    ]
    decided = iter(verdicts(family))
    by_question: dict[str, list[Verdict]] = {}
    for (question, dose), difference in zip(keys, differences, strict=True):
        verdict: Verdict = {
            "dose": dose,
            "quantization_loss": response.quantization_loss(backbone, dose)["value"],
            "difference": difference,
            "interval": None,
            "holds": None,
            "note": NOT_MEASURED,
        }
        if difference is not None:
            interval, holds = next(decided)
            note = question.objection(response, backbone, dose) if holds else ""
            verdict["interval"] = (interval.low, interval.high)
            verdict["holds"], verdict["note"] = None if note else holds, note
        by_question.setdefault(_key(question), []).append(verdict)
    return [
        {
            "claim": question.claim,
            "backbone": backbone,
            "recipe": question.recipe,
            "unit": question.unit,
            "verdicts": by_question[_key(question)],
            "words": in_words(by_question[_key(question)]),
        }
        for question in QUESTIONS
    ]


def _key(question: Question) -> str:
    return f"{question.claim} {question.recipe}"


_VERBS = {True: "holds", False: "fails", None: "inconclusive"}


def in_words(rows: Sequence[Verdict]) -> str:
    """The ranges of doses with one verdict, and what full depth loses there."""
    parts = []
    for word, group in groupby(rows, key=_verdict_word):
        own = list(group)
        losses = [row["quantization_loss"] for row in own]
        low, high = (_one_digit(each) for each in (min(losses), max(losses)))
        doses = f"{own[0]['dose']:g}" + (f" to {own[-1]['dose']:g}" if len(own) > 1 else "")
        points = low if low == high else f"{low} to {high}"
        parts.append(f"{word} at dose {doses} (loss {points} points)")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _verdict_word(row: Verdict) -> str:
    return _VERBS[row["holds"]] if row["difference"] else NOT_MEASURED


def _one_digit(value: float) -> str:
    """Minus as typeset, and none before 0.0."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "\u2212")


# The differences


def _collapse(response: Response, backbone: str, dose: float) -> Estimate:
    return response.quantization_loss(backbone, dose)


def _noise_grows(response: Response, backbone: str, dose: float) -> Estimate | None:
    """Spearman's correlation of NSR and depth; of n blocks without a trend 1 / sqrt(n - 1)."""
    nsr = torch.stack([cell["noise nsr"] for cell in response.at(backbone, dose)])
    if nsr.shape[1] < 3:
        return None
    return {
        "value": evidence.rank_correlation(nsr.mean(0).tolist()),
        "error": 1.0 / math.sqrt(nsr.shape[1] - 1),
        "seeds": [evidence.rank_correlation(row) for row in nsr.tolist()],
    }


def _gap(name: str) -> Difference:
    return lambda response, backbone, dose: response.gap(backbone, dose, name)


def _pruning(response: Response, backbone: str, dose: float) -> Estimate | None:
    """Only where the rule drops an exit with every seed."""
    is_dropped = all(bool(cell["is dropped"]) for cell in response.at(backbone, dose))
    return response.gap(backbone, dose, cells.PRUNING) if is_dropped else None


def _margin(recipe: str) -> Difference:
    return lambda response, backbone, dose: response.margin(backbone, dose, recipe)


def _owed(recipe: str) -> Difference:
    return lambda response, backbone, dose: response.owed(backbone, dose, recipe)


def _selective(response: Response, backbone: str, dose: float) -> Estimate | None:
    """Top-1 of the photos that exited - of those that stayed."""
    differences, variances = [], []
    for cell in response.at(backbone, dose):
        right = cell[f"right {PUBLISHED}"].double()
        exited = cell[f"exit block {PUBLISHED}"] < response.depth
        n = int(exited.sum()), int((~exited).sum())
        if not all(n):
            return None
        top1 = [100.0 * float(right[each].mean()) for each in (exited, ~exited)]
        differences.append(top1[0] - top1[1])
        variances.append(sum(map(evidence.share_variance, top1, n)))
    seeds = torch.tensor(differences, dtype=torch.float64)
    variance = sum(variances) / len(variances)
    if len(seeds) > 1:
        variance += float(seeds.var()) / len(seeds)
    return {"value": float(seeds.mean()), "error": variance**0.5, "seeds": differences}


def _by_chance(recipe: str) -> Objection:
    """McNemar's test of the first seed must agree."""

    def objection(response: Response, backbone: str, dose: float) -> str:
        p = response.mcnemar(backbone, dose, recipe)
        return "" if p < _MCNEMAR else f"McNemar p = {p:.2g}"

    return objection


def _nothing_rescued(recipe: str) -> Objection:
    """What is not above 0 is owed to nothing."""

    def objection(response: Response, backbone: str, dose: float) -> str:
        margin = response.margin(backbone, dose, recipe)["value"]
        return "" if margin > 0.0 else "nothing is rescued on balance"

    return objection


_RESCUE = "Exits are right more often than full depth: they rescue more than they lose"
_OWED = "What exits rescue is owed to quantization"

QUESTIONS = (
    Question("INT8 quantization costs zero-shot accuracy at full depth", "", _collapse),
    Question("Quantization noise grows with depth", "", _noise_grows, CORRELATION),
    Question(
        "Early on, a head on patch tokens works where one on the class token does not", "",
        _gap(cells.SHALLOW),
    ),
    Question(_RESCUE, PUBLISHED, _margin(PUBLISHED), objection=_by_chance(PUBLISHED)),
    Question(_RESCUE, BEST, _margin(BEST), objection=_by_chance(BEST)),
    Question(_OWED, PUBLISHED, _owed(PUBLISHED), objection=_nothing_rescued(PUBLISHED)),
    Question(_OWED, BEST, _owed(BEST), objection=_nothing_rescued(BEST)),
    Question(
        "Images that exit early are more often right than those that stay", PUBLISHED, _selective
    ),
    Question("The learned gate beats confidence alone", PUBLISHED, _gap(cells.GATE)),
    Question(
        "Dropping the exit with much noise (pathological layer pruning) helps", PUBLISHED, _pruning
    ),
    Question(
        "Heads taught by the float model beat heads taught by labels", PUBLISHED,
        _gap(cells.DISTILLED),
    ),
    Question("LRA-EE beats patience (PABEE) at equal FLOPs", BEST, _gap(study_schema.PABEE)),
    Question("LRA-EE beats the best static exit at equal FLOPs", BEST, _gap(study_schema.STATIC)),
)  # fmt: skip
"""The claims that a dose can change and that are run at every dose, in the order of the paper.

Not run: AdaViT's policy (image by image), SmoothQuant (it takes the dose out again: the calibrated
scheme does as much), and time, which no dose changes.
"""
