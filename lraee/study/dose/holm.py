"""The verdict rule of lraee.study.evidence for many comparisons at once: Holm's correction.

The rule decides where an interval excludes 0, or lies within `matters` of 0 on both sides. The
larger the level of the interval, the fewer it decides; p is the smallest alpha = 1 - level at which
it still does. Holm (1979) takes the comparisons by p, smallest first: the k-th of m is decided if
its p is at most alpha / (m - k + 1) and all before it were. The chance that any verdict of the m is
wrong is then at most alpha, however they depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from lraee.study.evidence import MATTERS, Difference

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """A difference with its standard error; normal errors are assumed.

    Args:
      value: that a claim says is above 0.
      error: 0 or above.
      matters: a difference that is surely smaller counts as none; 0 where any counts.
    """

    value: float
    error: float
    matters: float = MATTERS

    @property
    def p(self) -> float:
        """Smallest alpha at which the rule decides."""
        if self.error == 0.0:
            return 0.0 if self.value or self.matters else 1.0
        reach = max(abs(self.value), self.matters - abs(self.value))
        return math.erfc(reach / self.error / math.sqrt(2.0))

    def within(self, alpha: float) -> Difference:
        """The interval of level 1 - alpha."""
        reach = NormalDist().inv_cdf(1.0 - alpha / 2.0) * self.error
        return Difference(self.value, self.value - reach, self.value + reach)

    def holds(self, interval: Difference) -> bool | None:
        """The rule; see evidence.Difference."""
        if interval.low > 0.0:
            return True
        is_nothing = -self.matters < interval.low <= interval.high < self.matters
        return False if interval.high < 0.0 or is_nothing else None


def verdicts(comparisons: Sequence[Comparison]) -> list[tuple[Difference, bool | None]]:
    """Interval and verdict of each, in order; all of them are one family.

    Where Holm stops, the rest is inconclusive, with intervals of the level at which it stopped.
    """
    m = len(comparisons)
    order = sorted(range(m), key=lambda i: comparisons[i].p)
    result: list[tuple[Difference, bool | None]] = [(Difference(0.0, 0.0, 0.0), None)] * m
    stopped_at: float | None = None
    for rank, i in enumerate(order):
        alpha = stopped_at or ALPHA / (m - rank)
        if stopped_at is None and comparisons[i].p > alpha:
            stopped_at = alpha
        interval = comparisons[i].within(alpha)
        result[i] = interval, None if stopped_at else comparisons[i].holds(interval)
    return result
