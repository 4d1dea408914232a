import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lraee.calibration import thresholds as lct
from lraee.calibration.thresholds import NEVER, PAPER_GRID, Choice, ScoreTable

FULL_GRID = (*PAPER_GRID, NEVER)


def table_of(n: int, m: int, seed: int, *, levels: int = 0, nan_share: float = 0.1) -> ScoreTable:
    """Gains and costs are whole numbers, so that sums are exact; few levels make ties."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n, m), np.float32)
    if levels:
        scores = np.round(scores * levels) / np.float32(levels)
    scores[rng.random((n, m)) < nan_share] = np.nan
    gains = rng.integers(0, 2, (n, m + 1)).astype(np.float64)
    return ScoreTable(scores, gains, np.sort(rng.integers(1, 20, m + 1)).astype(np.float64))


def grids_of(m: int, seed: int, *, levels: int, most: int = 4) -> list[list[float]]:
    """Points that scores fall on, between and beyond; half of the grids end in NEVER."""
    rng = np.random.default_rng(seed)
    steps = np.arange(-1, 2 * levels + 2) / (2 * levels)
    sizes = rng.integers(1, most + 1, m)
    grids = [sorted(rng.choice(steps, size, replace=False).tolist()) for size in sizes]
    return [[*grid, NEVER] if rng.random() < 0.5 else grid for grid in grids]


def naive_leave_at(scores: NDArray[np.float32], thresholds: Sequence[float]) -> list[int]:
    exits = []
    for row in scores:
        left = len(row)
        for e, score in enumerate(row):
            if not math.isnan(score) and float(score) >= float(np.float32(thresholds[e])):
                left = e
                break
        exits.append(left)
    return exits


def all_choices(table: ScoreTable, grids: Sequence[Sequence[float]]) -> list[Choice]:
    """Every combination image by image, those of higher thresholds first."""
    choices = []
    for thresholds in itertools.product(*(sorted(grid, reverse=True) for grid in grids)):
        exits = naive_leave_at(table.scores, thresholds)
        gain = sum(table.gains[i, e] for i, e in enumerate(exits)) / len(exits)
        cost = sum(table.costs[e] for e in exits) / len(exits)
        rounded = tuple(float(np.float32(t)) for t in thresholds)
        choices.append(Choice(rounded, float(gain), float(cost)))
    return choices


def best_of(choices: list[Choice], max_cost: float) -> Choice:
    """Python's max keeps the first of equals, the one with higher thresholds."""
    affordable = [choice for choice in choices if choice.cost <= max_cost]
    return max(affordable, key=lambda choice: (choice.gain, -choice.cost))


def assert_all_found(table: ScoreTable, grids: Sequence[Sequence[float]]) -> None:
    """Search at every cost that can be reached, and the frontier, against brute force."""
    choices = all_choices(table, grids)
    costs = sorted({choice.cost for choice in choices}, reverse=True)
    best = [best_of(choices, cost) for cost in costs]
    for cost, expected in zip(costs, best, strict=True):
        assert lct.search(table, max_cost=cost, grids=grids) == expected
    assert lct.frontier(table, grids=grids) == list(dict.fromkeys(best))
    below = math.nextafter(costs[-1], -math.inf)
    with pytest.raises(ValueError, match="cheapest achievable cost"):
        lct.search(table, max_cost=below, grids=grids)


def test_paper_grid() -> None:
    assert len(PAPER_GRID) == 25 and PAPER_GRID[0] == 0.20 and PAPER_GRID[-1] == 0.92
    assert 0.44 in PAPER_GRID
    assert np.diff(PAPER_GRID) == pytest.approx(0.03)


def test_search_by_hand() -> None:
    """Two exits, three images; exit 0 is right of image 0 only, full depth of 1 and 2."""
    scores = np.array([[0.9, 0.0], [0.6, 0.7], [0.7, 0.2]], np.float32)
    gains = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]], np.float64)
    table = ScoreTable(scores, gains, np.array([1.0, 4.0, 10.0]))
    grids = [(0.5, 0.875, NEVER), (0.5, NEVER)]
    assert lct.search(table, max_cost=10, grids=grids) == Choice((0.875, 0.5), 1.0, 5.0)
    assert lct.search(table, max_cost=4.9, grids=grids) == Choice((0.5, NEVER), 1 / 3, 1.0)
    assert lct.frontier(table, grids=grids) == [
        Choice((0.875, 0.5), 1.0, 5.0),
        Choice((0.5, NEVER), 1 / 3, 1.0),
    ]


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize("seed", range(5))
def test_every_combination_is_weighed(m: int, n: int, seed: int) -> None:
    levels = 0 if seed == 0 else 4
    table = table_of(n, m, seed, levels=levels)
    assert_all_found(table, grids_of(m, seed, levels=4))


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(1, 3),
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(1, 5),
    nan_share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_combination_is_weighed_with_ties(
    m: int, n: int, seed: int, levels: int, nan_share: float
) -> None:
    table = table_of(n, m, seed, levels=levels, nan_share=nan_share)
    assert_all_found(table, grids_of(m, seed, levels=levels, most=3))


def test_gains_that_are_no_whole_numbers() -> None:
    """Sums in another order: 200 gains below 1 differ by less than 200 * 200 * 2**-53 < 1e-11."""
    table = table_of(200, 2, 0)
    rng = np.random.default_rng(0)
    table = ScoreTable(table.scores, rng.normal(size=table.gains.shape) / 8, table.costs * 0.3)
    grids = [PAPER_GRID[::6], (*PAPER_GRID[::6], NEVER)]
    for choice in lct.frontier(table, grids=grids):
        expected = best_of(all_choices(table, grids), choice.cost + 1e-11)
        assert choice.thresholds == expected.thresholds
        assert choice.gain == pytest.approx(expected.gain, abs=1e-11)
        assert choice.cost == pytest.approx(expected.cost, abs=1e-11)


@pytest.mark.parametrize("m", [4, 5])
def test_full_grids(m: int) -> None:
    """Up to 26**5 combinations: what is found holds image by image, and no sample beats it."""
    table, grids = table_of(3000, m, m), [FULL_GRID] * m
    budget = float(table.costs[-2:].mean())
    choice = lct.search(table, max_cost=budget, grids=grids)
    assert choice == lct.evaluate(table, choice.thresholds)
    assert choice.cost <= budget
    choices = lct.frontier(table, grids=grids)
    assert choice == next(each for each in choices if each.cost <= budget)
    # Costs rise with depth: the lowest points of all are the cheapest
    assert choices[-1].cost == lct.evaluate(table, [PAPER_GRID[0]] * m).cost
    for each in choices[:: max(1, len(choices) // 20)]:
        assert each == lct.evaluate(table, each.thresholds)
    gains, costs = (np.array([getattr(c, name) for c in choices]) for name in ("gain", "cost"))
    assert (np.diff(gains) < 0).all() and (np.diff(costs) < 0).all()
    rng = np.random.default_rng(0)
    for _ in range(300):
        other = lct.evaluate(table, rng.choice(FULL_GRID, m).tolist())
        assert any(c.gain >= other.gain and c.cost <= other.cost for c in choices)


@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_leave_at_is_the_first_that_reaches(m: int, seed: int) -> None:
    table = table_of(50, m, seed, levels=4)
    thresholds = np.random.default_rng(seed).choice([0.25, 0.3, 0.5, 0.75, NEVER], m).tolist()
    exits = lct.exit_at(table.scores, thresholds)
    assert exits.dtype == np.int64
    assert exits.tolist() == naive_leave_at(table.scores, thresholds)
    assert lct.exit_at(table.scores, [NEVER] * m).tolist() == [m] * 50
    assert lct.exit_at(np.full((2, m), np.nan, np.float32), [-1.0] * m).tolist() == [m, m]


def test_thresholds_are_compared_as_torch_compares_them() -> None:
    """A score of float32(0.44) lies below 0.44 in float64, but leaves."""
    scores = np.array(PAPER_GRID, np.float32)[:, None]
    for threshold in PAPER_GRID:
        leaves = (torch.from_numpy(scores[:, 0]) >= threshold).numpy()
        assert (lct.exit_at(scores, [threshold]) == 0).tolist() == leaves.tolist()
        table = ScoreTable(scores, np.eye(25, 2), np.array([1.0, 2.0]))
        choice = lct.search(table, max_cost=2, grids=[[threshold]])
        assert choice.cost == (50 - leaves.sum()) / 25
        # Exact in float32, so that a router may compare Python numbers
        assert choice.thresholds == (float(np.float32(threshold)),)


def good_table(**changes: object) -> ScoreTable:
    arrays: dict[str, object] = {
        "scores": np.zeros((3, 2), np.float32),
        "gains": np.zeros((3, 3)),
        "costs": np.ones(3),
    }
    return ScoreTable(**arrays | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": np.zeros((3, 2))}, TypeError, "scores must be float32, got float64"),
        (
            {"scores": np.zeros(3, np.float32)},
            ValueError,
            r"scores must have shape \[n, m\], n >= 1, got \[3\]",
        ),
        (
            {"scores": np.zeros((0, 2), np.float32)},
            ValueError,
            r"scores must have shape \[n, m\], n >= 1, got \[0, 2\]",
        ),
        (
            {"gains": np.zeros((3, 2))},
            ValueError,
            r"gains must have shape \[n, m \+ 1\] = \[3, 3\], got \[3, 2\]",
        ),
        (
            {"costs": np.ones(2)},
            ValueError,
            r"costs must have shape \[m \+ 1\] = \[3\], got \[2\]",
        ),
        (
            {"scores": np.full((3, 2), np.inf, np.float32)},
            ValueError,
            "scores must be finite or NaN, got Inf",
        ),
        (
            {"gains": np.full((3, 3), np.nan)},
            ValueError,
            "gains must be finite, got NaN or Inf",
        ),
        (
            {"costs": np.full(3, np.inf)},
            ValueError,
            "costs must be finite, got NaN or Inf",
        ),
    ],
)
def test_table_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ScoreTable: {message}$"):
        good_table(**changes)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[0.5]], r"grids must be one per exit = 2, got 1"),
        ([[0.5], []], r"grids\[1\] must ascend strictly .* at least one point, got \[\]"),
        ([[0.5, 0.5], [0.5]], r"grids\[0\] must ascend strictly .* got \[0.5, 0.5\]"),
        ([[0.5], [NEVER, 0.5]], r"grids\[1\] must ascend strictly .* got \[inf, 0.5\]"),
        ([[math.nan], [0.5]], r"grids\[0\] must ascend strictly .* got \[nan\]"),
        ([[0.5, math.nan], [0.5]], r"grids\[0\] must ascend strictly .* got \[0.5, nan\]"),
        ([[0.5, 0.5 + 1e-9], [0.5]], r"grids\[0\] must ascend strictly in float32"),
        (
            [range(4000), range(3000)],
            "grids must make at most 11,881,376 combinations, got 12,000,000",
        ),
    ],
)
def test_grid_errors(grids: list[list[float]], message: str) -> None:
    for run in (lct.frontier, lambda table, grids: lct.search(table, max_cost=9, grids=grids)):
        with pytest.raises(ValueError, match=f"^thresholds: {message}"):
            run(good_table(), grids=grids)


@pytest.mark.parametrize("m", [0, 6])
def test_number_of_exits(m: int) -> None:
    table = ScoreTable(np.zeros((3, m), np.float32), np.zeros((3, m + 1)), np.ones(m + 1))
    with pytest.raises(ValueError, match=f"^thresholds: exits must be 1 to 5, got {m}$"):
        lct.frontier(table, grids=[[0.5]] * m)


def test_budget_and_threshold_errors() -> None:
    message = "search: max_cost must be at least the cheapest achievable cost = 1.0, got 0.5"
    with pytest.raises(ValueError, match=f"^{message}$"):
        lct.search(good_table(), max_cost=0.5, grids=[[0.5], [0.5]])
    with pytest.raises(ValueError, match="^exit_at: thresholds must be one per exit = 2, got 1$"):
        lct.exit_at(np.zeros((3, 2), np.float32), [0.5])
    with pytest.raises(ValueError, match="^quantile_grid: points must be at least 1, got 0$"):
        lct.quantile_grid(np.zeros(3, np.float32), points=0)


def test_quantile_grid_by_hand() -> None:
    scores = np.arange(8, dtype=np.float32)
    assert lct.quantile_grid(scores, 3) == (1.5, 3.5, 5.5, NEVER)
    assert lct.quantile_grid(scores, 100) == (*(i + 0.5 for i in range(7)), NEVER)
    few = np.array([1, 1, 1, 1, 1, 3, np.nan, np.inf, -np.inf], np.float32)
    assert lct.quantile_grid(few, 3) == (2.0, NEVER)
    assert lct.quantile_grid(np.ones(4, np.float32)) == (NEVER,)
    assert lct.quantile_grid(np.full(4, np.nan, np.float32)) == (NEVER,)
    upper = np.nextafter(np.float32(0.5), np.float32(1))
    assert lct.quantile_grid(np.array([0.5, upper], np.float32)) == (float(upper), NEVER)


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.floats(width=32), min_size=0, max_size=60),
    points=st.integers(1, 30),
)
def test_quantile_grid_lies_between_scores(scores: list[float], points: int) -> None:
    array = np.array(scores, np.float32)
    *grid, last = lct.quantile_grid(array, points)
    finite = np.unique(array[np.isfinite(array)])
    assert last == NEVER
    assert len(grid) <= points
    assert grid == sorted(set(grid))
    for threshold in grid:
        assert threshold == float(np.float32(threshold))
        lower, upper = finite[finite < threshold].max(), finite[finite >= threshold].min()
        has_room = np.nextafter(lower, upper) < upper
        assert threshold < upper if has_room else threshold == upper


def test_quantile_grid_is_evenly_spaced() -> None:
    """Of 2,600 distinct scores every 100th: 100 images more stay under each next threshold."""
    scores = np.random.default_rng(0).permutation(2600).astype(np.float32)
    grid = lct.quantile_grid(scores)
    assert [(scores < threshold).sum() for threshold in grid] == [100 * i for i in range(1, 27)]


def test_rounding_flips_no_decision_on_a_quantile_grid() -> None:
    """Scores 2**-12 apart or more survive an error of 2**-14, such as another order of sums."""
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, 4096, 500) / 4096).astype(np.float32)
    moved = scores + (rng.random(500, np.float32) - np.float32(0.5)) * np.float32(2.0**-13)
    assert (moved != scores).any()
    for threshold in lct.quantile_grid(scores):
        before, after = (lct.exit_at(x[:, None], [threshold]) for x in (scores, moved))
        assert before.tolist() == after.tolist()
