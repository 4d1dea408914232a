"""Plans: against brute force over exits and thresholds; and what epsilon promises, simulated."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from lraee.calibration import gate_fitting, plans, scoring
from lraee.calibration.plans import Goal, Rules, make_plan
from lraee.calibration.risk import signed_epsilon
from lraee.calibration.scoring import Costs, ExitTable, Subset, Weights
from lraee.calibration.thresholds import NEVER, PAPER_GRID, quantile_grid
from lraee.exits.gate import GateKind
from lraee.exits.plan import Plan
from tests.calibration.exit_tables import FULL, make_costs, make_table, rows_of

BLOCKS = (4, 6, 8, 9)
M = len(BLOCKS)


def coarse(scores: np.ndarray[Any, Any], points: int) -> tuple[float, ...]:
    """Few thresholds, so that brute force over all combinations is quick."""
    return quantile_grid(scores, points=4)


@pytest.fixture
def few_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "quantile_grid", coarse)


def planned(
    kind: GateKind,
    gate_split: ExitTable,
    test_split: ExitTable,
    *,
    costs: Costs,
    rules: Rules | None = None,
    **goal: float,
) -> tuple[Plan, dict[str, Any]]:
    return make_plan(
        kind, BLOCKS, gate_split, test_split,
        costs=costs, goal=Goal(**goal), rules=rules or Rules(),
    )  # fmt: skip


# Brute force


def naive_run(
    split: ExitTable, scores: np.ndarray[Any, Any], subset: Subset, thresholds: Sequence[float],
    costs: Costs,
) -> tuple[float, float]:  # fmt: skip
    """Mean gain and mean cost, image by image; all exits of the subset are probed."""
    spent = costs.when_leaving(subset)
    gain = cost = 0.0
    for i, row in enumerate(scores):
        at = next(
            (e for e, (s, t) in enumerate(zip(row, thresholds, strict=True)) if s >= t), len(subset)
        )
        gain += split.gain[i, subset[at] if at < len(subset) else -1]
        cost += spent[at]
    return gain / len(scores), cost / len(scores)


def all_thresholds(kind: GateKind, scores: np.ndarray[Any, Any], grid: str) -> list[Any]:
    m = scores.shape[1]
    if kind == "static":
        return [(NEVER,), (-NEVER,)]
    if kind == "patience":
        return [(NEVER,) * m, *((float(step),) * m for step in range(1, m))]
    points = [
        PAPER_GRID if grid == "paper" else (-NEVER, *coarse(column, 4)) for column in scores.T
    ]
    return list(itertools.product(*points))


def best_within(
    kind: GateKind, split: ExitTable, subset: Subset, weights: tuple[Weights, ...], costs: Costs,
    most: float, grid: str,
) -> tuple[float, float] | None:  # fmt: skip
    """Largest gain within the budget, and minus the smallest cost that gives it."""
    scores = scoring.exit_scores(kind, split, subset, weights)
    runs = [
        naive_run(split, scores, subset, thresholds, costs)
        for thresholds in all_thresholds(kind, scores, grid)
    ]
    return max(((gain, -cost) for gain, cost in runs if cost <= most), default=None)


def all_subsets(kind: GateKind, rules: Rules) -> list[Subset]:
    if kind == "static":
        return [(e,) for e in range(M)]
    if kind == "patience":
        return [(0, 1, 2, 3), (1, 2, 3), (2, 3)]
    if not rules.is_subset_chosen:
        return [tuple(range(M))]
    sizes = range(2 if kind == "agreement" else 1, rules.max_exits + 1)
    return [subset for size in sizes for subset in itertools.combinations(range(M), size)]


CASES: list[tuple[GateKind, Rules, float]] = [
    ("learned", Rules(2), 0.8),
    ("learned", Rules(3), 0.6),
    ("learned", Rules(2, "paper", is_subset_chosen=True), 0.8),
    ("confidence", Rules(2), 0.7),
    ("confidence", Rules(4, is_subset_chosen=False), 0.8),
    ("agreement", Rules(3), 0.9),
    ("patience", Rules(3), 0.95),
    ("static", Rules(3), 0.7),
]


@pytest.mark.usefixtures("few_thresholds")
@pytest.mark.parametrize(("kind", "rules", "budget"), CASES)
def test_budget_against_brute_force(kind: GateKind, rules: Rules, budget: float) -> None:
    """The exits are best on the gate split, the thresholds on the other, within the budget."""
    gate_split, test_split = make_table(40, M, 0, nan_rows=1), make_table(50, M, 1, nan_rows=1)
    costs, most = make_costs(M, probe=2.0), budget * FULL
    best = None
    for subset in all_subsets(kind, rules):
        weights = gate_fitting.fit_weights(kind, gate_split, subset)
        key = best_within(kind, gate_split, subset, weights, costs, most, rules.grid)
        if key is not None and (best is None or key > best[0]):
            best = key, subset, weights
    assert best is not None
    _, subset, weights = best
    plan, figures = planned(kind, gate_split, test_split, costs=costs, rules=rules, budget=budget)
    assert set(plan.blocks) <= {BLOCKS[e] for e in subset}
    for block, row in zip(plan.blocks, plan.gate.weights, strict=True):
        assert row == weights[subset.index(BLOCKS.index(block))]
    expected = best_within(kind, test_split, subset, weights, costs, most, rules.grid)
    assert expected is not None, "the split must have a choice within the budget"
    assert figures["gain"] == pytest.approx(expected[0])
    # At least as cheap: exits that no image takes are dropped, and their probes with them
    assert FULL * (1 - figures["flops_saved"]) <= -expected[1] + 1e-9


@pytest.mark.usefixtures("few_thresholds")
@pytest.mark.parametrize("goal", [{"budget": 0.8}, {"epsilon": 0.3}])
@pytest.mark.parametrize("kind", get_args(GateKind))
@pytest.mark.parametrize("seed", range(3))
def test_figures_image_by_image(kind: GateKind, goal: dict[str, float], seed: int) -> None:
    gate_split, split = make_table(60, M, seed), make_table(80, M, seed + 100, nan_rows=1)
    costs = make_costs(M, probe=1.0)
    plan, figures = planned(kind, gate_split, split, costs=costs, **goal)
    subset = tuple(BLOCKS.index(block) for block in plan.blocks)
    assert figures["exits"] == list(plan.blocks) and figures["gate"] == kind
    full = float(split.gain[:, -1].mean())
    assert figures["gain_at_full_depth"] == pytest.approx(full)
    ran = scoring.run_plan(plan, BLOCKS, split, costs)
    assert figures["gain"] == pytest.approx(ran.gain)
    assert figures["flops_saved"] == pytest.approx(ran.flops_saved)
    counts = [int((ran.at == e).sum()) for e in (*subset, M)]
    assert figures["share"] == pytest.approx([count / 80 for count in counts])
    if subset:
        scores = scoring.exit_scores(kind, split, subset, plan.gate.weights)
        gain, cost = naive_run(split, scores, subset, plan.gate.thresholds, costs)
        assert figures["gain"] == pytest.approx(gain)
        assert figures["flops_saved"] == pytest.approx(1 - cost / FULL)
        if "budget" in goal:
            assert cost <= 80.0 + 1e-9


@pytest.mark.parametrize(
    ("kind", "thresholds", "kept"),
    [
        ("learned", (0.5, NEVER, 0.25), [0, 2]),
        ("confidence", (NEVER, NEVER), []),
        ("static", (-NEVER,), [0]),
        ("patience", (2.0, 2.0, 2.0), [0, 1, 2]),
        ("patience", (NEVER, NEVER), []),
        ("agreement", (NEVER, 0.5, 0.5), [0, 1, 2]),
        ("agreement", (NEVER, NEVER, 0.5), [1, 2]),
        ("agreement", (NEVER, 0.5, NEVER), [0, 1]),
        ("agreement", (NEVER, 0.5, NEVER, NEVER, 0.5), [0, 1, 3, 4]),
        ("agreement", (NEVER, NEVER), []),
    ],
)
def test_exits_worth_a_probe(kind: GateKind, thresholds: Any, kept: list[int]) -> None:
    assert plans._kept(kind, thresholds) == kept


@pytest.mark.parametrize("seed", range(20))
def test_exits_that_are_dropped_change_no_decision(seed: int) -> None:
    """Agreement looks back at one exit, patience at all: what they see must stay."""
    rng = np.random.default_rng(seed)
    split, costs = make_table(60, M, seed), make_costs(M)
    subset = tuple(range(M))
    kind: GateKind = "agreement" if seed % 2 else "patience"
    weights = gate_fitting.fit_weights(kind, split, subset)
    scores = scoring.exit_scores(kind, split, subset, weights)
    thresholds = [float(step) for step in rng.choice([1, 2, NEVER], M)]
    if kind == "agreement":
        thresholds = [float(rng.choice([*coarse(column, 4), NEVER])) for column in scores.T]
    kept = plans._kept(kind, thresholds)
    expected, _ = naive_run(split, scores, subset, thresholds, costs)
    if kept:
        part = scoring.exit_scores(kind, split, tuple(kept), tuple(weights[e] for e in kept))
        actual, _ = naive_run(split, part, tuple(kept), [thresholds[e] for e in kept], costs)
        assert actual == expected


def test_static_picks_the_best_exit_that_is_affordable() -> None:
    gate_split = make_table(200, M, 3)
    costs = make_costs(M, probe=2.0)  # leaving costs 22, 42, 62, 82 of 100
    for budget, allowed in ((0.25, [0]), (0.5, [0, 1]), (0.7, [0, 1, 2]), (0.9, [0, 1, 2, 3])):
        plan, figures = planned("static", gate_split, gate_split, costs=costs, budget=budget)
        gains = gate_split.gain.mean(0)
        best = max(allowed, key=lambda e: (gains[e], -e))
        assert plan.blocks == (BLOCKS[best],) and plan.gate.thresholds == (-NEVER,)
        assert figures["gain"] == pytest.approx(gains[best])
        assert figures["share"] == [1.0, 0.0]


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_a_budget_out_of_reach_is_one_line(kind: GateKind) -> None:
    split = make_table(50, M, 4)
    with pytest.raises(ValueError) as caught:
        planned(kind, split, split, costs=make_costs(M), budget=0.1)
    assert str(caught.value) == (
        f"calibrate: the {kind} gate must reach the budget of 0.1, got no exits that do; ask for"
        " less, or give other candidates"
    )


def test_where_chance_left_no_choice_within_the_budget_the_cheapest_is_taken() -> None:
    """Exits fit the budget on one split; on the other no score is high enough."""
    gate_split = make_table(60, M, 5)
    test_split = replace(gate_split, features=gate_split.features * np.nan)
    plan, figures = planned("confidence", gate_split, test_split, costs=make_costs(M), budget=0.7)
    assert plan.blocks == () and figures["flops_saved"] == 0.0


def test_agreement_has_its_two_exits_where_probes_are_dear() -> None:
    split = make_table(80, M, 6)
    plan, _ = planned("agreement", split, split, costs=make_costs(M), rules=Rules(1), budget=0.95)
    assert len(plan.blocks) == 2
    one, _ = planned("learned", split, split, costs=make_costs(M), rules=Rules(1), budget=0.95)
    assert len(one.blocks) <= 1


# Epsilon


DELTA, CALIBRATIONS = 0.1, 300


def violations(kind: GateKind, epsilon: float, *, is_signed: bool) -> tuple[int, int]:
    """How many of 300 calibrations exceed epsilon on the population, and how many save anything."""
    population = make_table(4000, 3, 7, is_signed=is_signed)
    costs = make_costs(3)
    allowed = signed_epsilon(epsilon) if is_signed else epsilon
    rng = np.random.default_rng(0)
    wrong = saving = 0
    for _ in range(CALIBRATIONS):
        rows = rng.choice(4000, 240, replace=False)
        plan, figures = make_plan(
            kind, (1, 2, 3), rows_of(population, rows[:90]), rows_of(population, rows[90:]),
            costs=costs, goal=Goal(epsilon=epsilon, delta=DELTA), rules=Rules(1),
        )  # fmt: skip
        at = scoring.run_plan(plan, (1, 2, 3), population, costs).at
        risk = float(population.loss[np.arange(4000), at].mean())
        if figures["is_certified"]:
            wrong += risk > allowed
        else:
            assert plan.blocks == ()
        saving += bool(plan.blocks)
    return wrong, saving


MOST = DELTA + 3 * (DELTA * (1 - DELTA) / CALIBRATIONS) ** 0.5
"""Share of violations that a right procedure exceeds in one of 700 such simulations at most."""


@pytest.mark.parametrize(
    ("kind", "epsilon", "is_signed"),
    [("confidence", 0.2, False), ("static", 0.25, False), ("learned", 0.1, True)],
)
def test_epsilon_holds_in_all_but_delta_of_the_calibrations(
    kind: GateKind, epsilon: float, is_signed: bool
) -> None:
    wrong, saving = violations(kind, epsilon, is_signed=is_signed)
    assert wrong / CALIBRATIONS <= MOST, wrong
    assert saving > CALIBRATIONS / 3, "calibrations that save nothing prove nothing"


def test_the_simulation_would_notice_a_choice_without_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taking the cheapest plan whose mean loss is within epsilon fails far more often."""

    def by_mean(losses: Any, *, epsilon: float, delta: float, bound: str) -> int | None:
        passing = np.flatnonzero(losses.mean(0) <= epsilon)
        return int(passing[-1]) if len(passing) else None

    monkeypatch.setattr(plans.risk, "learn_then_test", by_mean)
    wrong, _ = violations("confidence", 0.2, is_signed=False)
    assert wrong / CALIBRATIONS > 2 * MOST, wrong


@pytest.mark.parametrize("kind", get_args(GateKind))
@pytest.mark.usefixtures("few_thresholds")
def test_exits_and_path_never_see_the_losses_that_are_tested(
    kind: GateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the test split holds, the configurations that are tested on it are the same."""
    paths: list[Any] = []
    original = plans._Planner.tested

    def tested(self: Any, path: Any, table: Any, split: ExitTable, subset: Subset) -> Any:
        paths.append((path, subset))
        return original(self, path, table, split, subset)

    monkeypatch.setattr(plans._Planner, "tested", tested)
    gate_split, costs = make_table(80, M, 8), make_costs(M)
    for seed in (9, 10):
        test_split = make_table(70, M, seed)
        planned(kind, gate_split, test_split, costs=costs, epsilon=0.2)
        worst = replace(test_split, loss=1.0 - test_split.loss, gain=1.0 - test_split.gain)
        planned(kind, gate_split, worst, costs=costs, epsilon=0.2)
    assert len(paths) == 4 and all(path == paths[0] for path in paths)
    path = paths[0][0]
    assert set(path[0].thresholds) == {NEVER}
    assert len(path) <= plans.PATH_STEPS + 1
    costs_along = [choice.cost for choice in path]
    assert costs_along[1:] == sorted(costs_along[1:], reverse=True)


@pytest.mark.parametrize("kind", ["confidence", "static"])
@pytest.mark.usefixtures("few_thresholds")
def test_exits_for_a_proof_are_the_cheapest_that_would_likely_pass(kind: GateKind) -> None:
    """Along each path up to the first whose mean loss + 1.645 standard errors exceeds epsilon."""
    gate_split, costs, images = make_table(150, M, 15), make_costs(M), 200
    planner = plans._Planner(kind, costs, Goal(epsilon=0.2), Rules(2))
    cheapest = {}
    for subset in all_subsets(kind, Rules(2)):
        weights = gate_fitting.fit_weights(kind, gate_split, subset)
        table = plans.score_table(kind, gate_split, subset, weights, costs)
        for choice in planner.path(table):
            loss = gate_split.losses(table, subset, [choice.thresholds])[:, 0]
            if loss.mean() + 1.645 * (loss.var() / images) ** 0.5 > 0.2:
                break
            cheapest[subset] = choice.cost
    best = min(cheapest, key=lambda subset: cheapest[subset])
    assert planner.choose_exits(gate_split, images=images)[0] == best
    far = plans._Planner(kind, costs, Goal(epsilon=0.2, delta=1e-9), Rules(2))
    assert far.choose_exits(gate_split, images=10)[0] != best, "with few images it must be safer"


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_too_few_images_prove_nothing(kind: GateKind) -> None:
    """Even without a single loss, 30 images cannot prove 1 % at 95 %: 0.99 ** 30 = 0.74."""
    gate_split, few = make_table(100, M, 11), make_table(30, M, 12)
    plan, figures = planned(kind, gate_split, few, costs=make_costs(M), epsilon=0.01)
    assert plan.blocks == () and plan.gate.kind == kind
    assert figures["is_certified"] is False
    assert figures["flops_saved"] == 0.0 and figures["share"] == [1.0]
    assert figures["loss"] == 0.0 and figures["step"] == 0


@pytest.mark.parametrize("is_signed", [False, True])
def test_what_was_proven_is_on_the_card(is_signed: bool) -> None:
    gate_split = make_table(300, M, 13, is_signed=is_signed)
    split = make_table(600, M, 14, is_signed=is_signed)
    costs = make_costs(M)
    plan, figures = planned("confidence", gate_split, split, costs=costs, epsilon=0.2)
    assert figures["is_certified"] is True and plan.blocks
    assert (figures["epsilon"], figures["delta"], figures["images"]) == (0.2, 0.05, 600)
    assert figures["bound"] == ("betting" if is_signed else "hoeffding_bentkus")
    at = scoring.run_plan(plan, BLOCKS, split, costs).at
    if is_signed:  # a drop of accuracy
        loss = split.gain[:, -1].mean() - split.gain[np.arange(600), at].mean()
    else:  # answers that are not those of full depth
        loss = np.mean([split.loss[i, e] for i, e in enumerate(at)])
    assert figures["loss"] == pytest.approx(float(loss), abs=1e-12)
    assert figures["loss"] < 0.2 and 0 < figures["step"] < figures["steps"]


# What is refused


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "budget or epsilon must be given, one of the two, got None and None"),
        ({"budget": 0.5, "epsilon": 0.1}, ".* one of the two, got 0.5 and 0.1"),
        ({"budget": 1.0}, r"budget must be in \(0, 1\), got 1.0"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\), got 0.0"),
        ({"epsilon": -0.1}, r"epsilon must be in \(0, 1\), got -0.1"),
        ({"budget": 0.5, "delta": 1.0}, r"delta must be in \(0, 1\), got 1.0"),
    ],
)
def test_goals_out_of_range(goal: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^calibrate: {message}"):
        Goal(**goal)
