"""Holm's correction of the verdict rule."""

import random
from statistics import NormalDist

import pytest

from lraee.study.dose.holm import ALPHA, Comparison, verdicts

Z = NormalDist().inv_cdf


def test_one_comparison_is_the_rule_itself() -> None:
    for value, holds in ((2.0, True), (1.9, None), (-2.0, False)):
        ((interval, verdict),) = verdicts([Comparison(value, 1.0)])
        assert verdict is holds
        assert (interval.low, interval.high) == pytest.approx(
            (value - 1.96, value + 1.96), abs=1e-3
        )
    assert verdicts([Comparison(0.1, 0.1)])[0][1] is False
    assert verdicts([Comparison(0.1, 0.1, matters=0.0)])[0][1] is None


def test_steps_down_from_the_smallest_p() -> None:
    """Of three the first is decided at alpha / 3, the next at alpha / 2, the last at alpha."""
    limits = [Z(1.0 - ALPHA / m / 2.0) for m in (3, 2, 1)]
    values = [limit + 1e-6 for limit in limits]
    family = [Comparison(value, 1.0, matters=0.0) for value in reversed(values)]
    assert [holds for _, holds in verdicts(family)] == [True, True, True]
    family[1] = Comparison(limits[1] - 1e-3, 1.0, matters=0.0)
    assert [holds for _, holds in verdicts(family)] == [None, None, True]
    interval = verdicts(family)[0][0]
    assert interval.high - interval.low == pytest.approx(2.0 * limits[1])


def test_p_is_where_the_rule_begins_to_decide() -> None:
    for value, error, matters in ((1.0, 0.4, 0.5), (0.1, 0.2, 0.5), (-3.0, 2.0, 0.0)):
        each = Comparison(value, error, matters)
        assert each.holds(each.within(each.p * 1.0001)) is not None
        assert each.holds(each.within(each.p * 0.9999)) is None


def test_certain_differences() -> None:
    assert Comparison(1.0, 0.0).p == 0.0 and Comparison(0.0, 0.0, matters=0.0).p == 1.0
    assert [holds for _, holds in verdicts([Comparison(1.0, 0.0), Comparison(0.0, 0.0)])] == [
        True, False,
    ]  # fmt: skip
    assert verdicts([]) == []


def test_wrong_verdicts_of_a_family_are_rare() -> None:
    """Twenty differences that are 0: any verdict "holds" or "below 0" is wrong."""
    source = random.Random(0)
    wrong = sum(
        any(
            holds is not None
            for _, holds in verdicts([Comparison(source.gauss(0, 1), 1.0, 0.0) for _ in range(20)])
        )
        for _ in range(2000)
    )
    assert wrong <= 0.065 * 2000
