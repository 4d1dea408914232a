"""Layer-adaptive confidence thresholds (LCT): one threshold per exit, all of them chosen together.

Every combination of the candidates is weighed, at a price that hardly depends on the number of
images: see [NOTE: survivors].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEVER = math.inf
"""A threshold that no image reaches."""

PAPER_GRID: tuple[float, ...] = tuple(round(0.20 + 0.03 * i, 2) for i in range(25))
"""25 points over [0.20, 0.92]."""

MAX_EXITS = 5
MAX_COMBINATIONS = (len(PAPER_GRID) + 1) ** MAX_EXITS
"""26**5 = 11,881,376: five exits on the paper's grid and NEVER. The search keeps two float64 for
each (190 MB) and takes 0.4 GB while it works; a sixth exit would make that 26 times as much."""

Grids = Sequence[Sequence[float]]
Indices = NDArray[np.int64]
Scores = NDArray[np.float32]
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """What each of n images would do at each of m exits.

    Args:
      scores: float32 [n, m], higher is surer; NaN never exits.
      gains: float64 [n, m + 1], what is gained if the image exits here, such as 1.0 if it
        is right there; the last column is for running to full depth.
      costs: float64 [m + 1], FLOPs of an image that exits here, the exits that it passed
        included; the last is for full depth.
    Raises: ValueError on a shape, on no images, and on values that are not finite; TypeError on
      scores of another type.
    """

    scores: Scores
    gains: Values
    costs: Values

    def __post_init__(self) -> None:
        """Raises ValueError and TypeError, see above."""
        if self.scores.dtype != np.float32:
            raise TypeError(f"ScoreTable: scores must be float32, got {self.scores.dtype}")
        if self.scores.ndim != 2 or len(self.scores) == 0:
            shape = list(self.scores.shape)
            raise ValueError(f"ScoreTable: scores must have shape [n, m], n >= 1, got {shape}")
        n, m = self.scores.shape
        if self.gains.shape != (n, m + 1):
            shape = list(self.gains.shape)
            raise ValueError(
                f"ScoreTable: gains must have shape [n, m + 1] = {[n, m + 1]}, got {shape}"
            )
        if self.costs.shape != (m + 1,):
            shape = list(self.costs.shape)
            raise ValueError(f"ScoreTable: costs must have shape [m + 1] = {[m + 1]}, got {shape}")
        if np.isinf(self.scores).any():
            raise ValueError("ScoreTable: scores must be finite or NaN, got Inf")
        for name, values in (("gains", self.gains), ("costs", self.costs)):
            if not np.isfinite(values).all():
                raise ValueError(f"ScoreTable: {name} must be finite, got NaN or Inf")


@dataclass(frozen=True)
class Choice:
    """A threshold per exit, exact in float32, and an image's mean gain and mean cost under them."""

    thresholds: tuple[float, ...]
    gain: float
    cost: float


def exit_at(scores: Scores, thresholds: Sequence[float]) -> Indices:
    """The first exit whose score reaches its threshold, m if none does.

    Thresholds are rounded to float32 first, as torch does to compare a float32 tensor with them.

    Args:
      scores: float32 [n, m], finite or NaN.
      thresholds: m of them; NEVER keeps all.
    Returns: int64 [n], 0..m.
    """
    n, m = scores.shape
    if len(thresholds) != m:
        raise ValueError(f"exit_at: thresholds must be one per exit = {m}, got {len(thresholds)}")
    exits_here = np.ones((n, m + 1), dtype=bool)
    exits_here[:, :m] = scores >= np.asarray(thresholds, np.float32)
    exits: Indices = exits_here.argmax(1)
    return exits


def evaluate(table: ScoreTable, thresholds: Sequence[float]) -> Choice:
    """Mean gain and mean cost under these thresholds, image by image."""
    exits = exit_at(table.scores, thresholds)
    gain = table.gains[np.arange(len(exits)), exits].mean()
    cost = table.costs[exits].mean()
    rounded = np.asarray(thresholds, np.float32)
    return Choice(tuple(rounded.tolist()), float(gain), float(cost))


def search(table: ScoreTable, *, max_cost: float, grids: Grids) -> Choice:
    """The best mean gain among all combinations whose mean cost is at most max_cost.

    Of equal gains the cheaper one, of equal costs then the higher thresholds, the first exit's
    counting first.

    Args:
      table: images whose labels were used for nothing else.
      max_cost: FLOPs per image.
      grids: per exit its candidates, strictly ascending; the last may be NEVER.
    Raises: ValueError on grids that do not fit the table, on more than MAX_EXITS or
      MAX_COMBINATIONS, and if no combination is cheap enough.
    """
    points = _checked(table, grids)
    gain, cost = _means(table, points)
    is_affordable = cost <= max_cost
    if not is_affordable.any():
        raise ValueError(
            f"search: max_cost must be at least the cheapest achievable cost = {cost.min()}, "
            f"got {max_cost}"
        )
    best = np.flatnonzero(is_affordable & (gain == gain[is_affordable].max()))
    cheapest = best[cost.flat[best] == cost.flat[best].min()]
    return _choice(gain, cost, points, int(cheapest[-1]))


def frontier(table: ScoreTable, *, grids: Grids) -> list[Choice]:
    """Every choice that is best at its own cost, from the most expensive one to the cheapest.

    Gain and cost both fall strictly along the list, which begins at the best gain of all
    combinations. `search` returns the first member that max_cost affords: ties break as there.

    Args and raises: see search.
    """
    points = _checked(table, grids)
    gain, cost = _means(table, points)
    # One first threshold at a time: sorting 26 parts is cheaper than sorting all
    part_size = gain[0].size
    parts = zip(gain.reshape(-1, part_size), cost.reshape(-1, part_size), strict=True)
    kept = np.concatenate([i * part_size + _undominated(*part) for i, part in enumerate(parts)])
    kept = kept[_undominated(gain.flat[kept], cost.flat[kept])]
    return [_choice(gain, cost, points, int(i)) for i in kept]


def quantile_grid(scores: Scores, points: int = 25) -> tuple[float, ...]:
    """Thresholds at evenly spaced quantiles of the finite scores, then NEVER.

    A threshold lies halfway between two neighbouring distinct scores, so that no image sits on it:
    scores may move by less than half their distance, as rounding moves them, and the decision
    stands. It is a float32 number above the lower of the two, the upper one itself where float32
    has nothing between them.

    Args:
      scores: float32 [n]; what is not finite is left out.
      points: at most this many before NEVER, fewer where scores coincide.
    Returns: strictly ascending.
    """
    if points < 1:
        raise ValueError(f"quantile_grid: points must be at least 1, got {points}")
    distinct, counts = np.unique(scores[np.isfinite(scores)], return_counts=True)
    if len(distinct) < 2:
        return (NEVER,)
    stay = counts.cumsum()[:-1]  # below the gap above each distinct score but the last
    quantiles = counts.sum() * np.arange(1, points + 1) / (points + 1)
    gaps = np.unique(np.searchsorted(stay, quantiles).clip(max=len(stay) - 1))
    lower, upper = distinct[gaps], distinct[gaps + 1]
    halfway = ((lower.astype(np.float64) + upper) / 2).astype(np.float32)
    return (*np.where(halfway > lower, halfway, upper).tolist(), NEVER)


def _checked(table: ScoreTable, grids: Grids) -> list[Scores]:
    """The grids rounded to float32, as exit_at rounds thresholds."""
    m = table.scores.shape[1]
    if not 1 <= m <= MAX_EXITS:
        raise ValueError(f"thresholds: exits must be 1 to {MAX_EXITS}, got {m}")
    if len(grids) != m:
        raise ValueError(f"thresholds: grids must be one per exit = {m}, got {len(grids)}")
    rounded = [np.asarray(grid, np.float32) for grid in grids]
    for e, grid in enumerate(rounded):
        if len(grid) == 0 or np.isnan(grid[0]) or not (grid[1:] > grid[:-1]).all():
            raise ValueError(
                f"thresholds: grids[{e}] must ascend strictly in float32 from at least one point, "
                f"got {list(grids[e])}"
            )
    combinations = math.prod(len(grid) for grid in rounded)
    if combinations > MAX_COMBINATIONS:
        raise ValueError(
            f"thresholds: grids must make at most {MAX_COMBINATIONS:,} combinations, "
            f"got {combinations:,}"
        )
    return rounded


def _means(table: ScoreTable, grids: list[Scores]) -> tuple[Values, Values]:
    """Mean gain and mean cost of every combination, both [len(grid) for each grid].

    [NOTE: survivors] An image that runs past exit e swaps what it would get there for what it
    would get at exit e + 1. So under thresholds t the sum over images is

        sum_i gains[i, 0]  +  sum_e sum_{i past exits 0..e} (gains[i, e + 1] - gains[i, e])

    Let k_e be how many points of grid e image i reaches, points <= score. Under the points number
    t_0, t_1, … it runs past exits 0..e iff k_0 <= t_0, …, k_e <= t_e. Hence the inner sum, for all
    combinations at once, is the cumulative sum along every axis of a histogram of the images over
    (k_0, …, k_e), weighted by their swaps. An image that reaches every point of a grid always
    exits there and is in no cell. Sums of whole numbers below 2**53 are exact, in any order.
    """
    n = len(table.scores)
    gain, cost = np.array(table.gains[:, 0].sum()), np.array(n * table.costs[0])
    images, cells = np.arange(n), np.zeros(n, dtype=np.int64)
    shape: tuple[int, ...] = ()
    for e, grid in enumerate(grids):
        scores = table.scores[images, e]
        # numpy sorts NaN above all; here it reaches nothing
        reached = np.where(np.isnan(scores), 0, np.searchsorted(grid, scores, "right"))
        may_stay = reached < len(grid)
        images, cells = images[may_stay], cells[may_stay] * len(grid) + reached[may_stay]
        shape = (*shape, len(grid))
        swaps = table.gains[images, e + 1] - table.gains[images, e]
        gain = gain[..., None] + _sums_within(cells, swaps, shape)
        survivors = _sums_within(cells, np.ones(len(cells)), shape)
        cost = cost[..., None] + survivors * (table.costs[e + 1] - table.costs[e])
    gain /= n
    cost /= n
    return gain, cost


def _sums_within(cells: Indices, weights: Values, shape: tuple[int, ...]) -> Values:
    """For every cell the weights of the images in it and in all cells below it along every axis."""
    histogram = np.bincount(cells, weights, minlength=math.prod(shape))
    sums: Values = histogram.astype(np.float64, copy=False).reshape(shape)
    for axis in range(len(shape)):
        np.cumsum(sums, axis=axis, out=sums)
    return sums


def _undominated(gain: Values, cost: Values) -> Indices:
    """Where no other entry has at least the gain for at most the cost, by falling cost.

    Of entries that are equal in both, the last.
    """
    # From behind, so that a stable sort puts the last of equals first
    order: Indices = len(gain) - 1 - np.lexsort((-gain[::-1], cost[::-1]))
    best_so_far = np.maximum.accumulate(gain[order])
    is_better = np.append(True, best_so_far[1:] > best_so_far[:-1])
    kept: Indices = order[is_better][::-1]
    return kept


def _choice(gain: Values, cost: Values, points: list[Scores], index: int) -> Choice:
    """The combination at this index of the flattened tables."""
    place = np.unravel_index(index, gain.shape)
    thresholds = tuple(float(grid[i]) for grid, i in zip(points, place, strict=True))
    return Choice(thresholds, float(gain.flat[index]), float(cost.flat[index]))
