"""What a difference of two accuracies on the same photos is worth: its standard error and verdict.

The rule for "holds", used for every claim. A claim says that one figure lies above another. It
holds if the interval of the difference lies above 0. It fails if that interval lies below 0, or
within half a point of 0 on both sides: then nothing that matters is there. Else it is inconclusive.
An interval is a measured 95 % interval where the study has one, else the difference +- 2 standard
errors, which count both the spread over seeds and the luck of the photos:

- A photo can change the difference of two systems only where one of them disagrees with the float
  model, so that the variance by photos is at most (disagreement of one + of the other) / photos.
  This bound needs no assumption; it errs towards "inconclusive".
- Where agreement was not measured, the two accuracies count as of independent photos.
- Over seeds: std^2 / seeds of each.
"""

import math
from dataclasses import dataclass

from lraee.study.schema import MainRow, Quadrants, Spread

MATTERS = 0.5
"""Points of top-1; a difference that is surely smaller counts as none."""


@dataclass(frozen=True)
class Difference:
    """A difference in points, and the interval in which it lies."""

    points: float
    low: float
    high: float

    @property
    def holds(self) -> bool | None:
        """Whether it is above 0, by the rule of this file."""
        if self.low > 0.0:
            return True
        if self.high < 0.0 or -MATTERS < self.low <= self.high < MATTERS:
            return False
        return None

    def __str__(self) -> str:
        """As in +0.42 points (-0.10 to +0.94)."""
        return f"{signed(self.points)} points ({signed(self.low)} to {signed(self.high)})"


def signed(value: float) -> str:
    """Two digits with sign, minus as typeset."""
    return f"{value:+.2f}".replace("-", "\u2212")


def between(points: float, variance: float) -> Difference:
    """points +- 2 standard errors."""
    reach = 2.0 * math.sqrt(variance)
    return Difference(points, points - reach, points + reach)


def of_rows(better: MainRow, worse: MainRow, *, photos: int) -> Difference:
    """top-1 of one row - of another, on the same photos."""
    variance, changed = 0.0, 0.0
    for row in (better, worse):
        variance += _seed_variance(row["top1"], row["seeds"])
        changed += 100.0 - (row["agreement"]["mean"] if row["agreement"] else 0.0)
    points = better["top1"]["mean"] - worse["top1"]["mean"]
    return between(points, variance + changed_variance(changed, photos))


def of_spreads(better: Spread, worse: Spread, *, seeds: int, photos: int) -> Difference:
    """Difference of two accuracies whose agreement was not measured."""
    variance = sum(
        _seed_variance(each, seeds) + share_variance(each["mean"], photos)
        for each in (better, worse)
    )
    return between(better["mean"] - worse["mean"], variance)


def of_shares(better: float, worse: float, photos: tuple[float, float]) -> Difference:
    """Difference of the accuracies (in percent) of two disjoint groups of photos."""
    variance = share_variance(better, photos[0]) + share_variance(worse, photos[1])
    return between(better - worse, variance)


def of_margin(part: Quadrants, *, seeds: int, photos: int) -> Difference:
    """Rescue margin, mean over seeds; all seeds saw the same photos, each worth -1, 0 or 1."""
    changed = (part["rescue"] + part["loss"]) / max(part["images"], 1)
    margin = part["margin"]["mean"]
    over_photos = max(1e4 * changed - margin**2, 0.0) / max(photos, 1)
    return between(margin, _seed_variance(part["margin"], seeds) + over_photos)


def changed_variance(changed: float, photos: float) -> float:
    """Largest variance, in points^2, if at most `changed` percent of photos change."""
    return 100.0 * min(max(changed, 0.0), 100.0) / max(photos, 1.0)


def share_variance(percent: float, photos: float) -> float:
    """p (100 - p) / n, with one right and one wrong photo added: never 0 of a few photos."""
    n = max(photos, 0.0) + 2.0
    p = (percent * (n - 2.0) + 100.0) / n
    return p * (100.0 - p) / n


def _seed_variance(spread: Spread, seeds: int) -> float:
    return spread["std"] ** 2 / max(seeds, 1)


def rank_correlation(values: list[float]) -> float:
    """Spearman's correlation of values with their place in the list; 0 if all are equal."""
    n = len(values)
    ranks = [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]
    middle = (n - 1) / 2
    products = [(i - middle, rank - middle) for i, rank in enumerate(ranks)]
    norm = math.sqrt(sum(a * a for a, _ in products) * sum(b * b for _, b in products))
    return sum(a * b for a, b in products) / norm if norm else 0.0
