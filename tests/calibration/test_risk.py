import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from numpy.typing import NDArray

from lraee.calibration import risk
from lraee.calibration.risk import Bound

BOUNDS: tuple[Bound, ...] = get_args(Bound)
DELTA = 0.1
RUNS = 5000
Draw = Callable[[np.random.Generator], NDArray[np.float64]]

each_bound = pytest.mark.parametrize("bound", BOUNDS)


def at_most(share: float, runs: int) -> float:
    """A share whose true value is `share` is measured below this, but once in 740 times."""
    return share + 3 * math.sqrt(share * (1 - share) / runs)


def binomial_cdf(k: int, n: int, p: str) -> float:
    """In whole numbers, rounded once at the end."""
    hits, all_ = Fraction(p).as_integer_ratio()
    return sum(math.comb(n, i) * hits**i * (all_ - hits) ** (n - i) for i in range(k + 1)) / all_**n


# p-values by hand


@pytest.mark.parametrize(
    ("mean_loss", "n", "epsilon", "p"),
    [
        (0.0, 10, 0.1, 0.9**10),  # h1(0, b) = -log(1 - b)
        (0.25, 8, 0.5, (0.5**0.25 * 1.5**0.75) ** -8),  # Hoeffding: 0.351; Bentkus: e * 37 / 256
        (0.0, 1, 0.5, 0.5),
        (0.5, 100, 0.5, 1.0),
        (0.9, 100, 0.5, 1.0),
        (1.0, 1, 0.5, 1.0),
        (7 / 100, 100, 0.2, math.e * binomial_cdf(7, 100, "0.2")),
        (0.0799, 100, 0.2, math.e * binomial_cdf(8, 100, "0.2")),
    ],
)
def test_hoeffding_bentkus_by_hand(mean_loss: float, n: int, epsilon: float, p: float) -> None:
    # bdtr is accurate to about 1e-14 here
    assert risk.hoeffding_bentkus(mean_loss, n, epsilon) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("n", [29, 49, 100, 977])
def test_whole_losses_are_not_rounded_up(n: int) -> None:
    """k / n * n may exceed k in float64, by as little as it takes for ceil to give k + 1."""
    for k in range(0, n // 5, max(1, n // 100)):
        hoeffding = math.exp(
            -n * (1 - k / n) * math.log((1 - k / n) / 0.7)
            - (k * math.log(k / n / 0.3) if k else 0.0)
        )
        expected = min(hoeffding, math.e * binomial_cdf(k, n, "0.3"))
        assert risk.hoeffding_bentkus(k / n, n, 0.3) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    mean_loss=st.floats(0, 1),
    n=st.integers(1, 5000),
    epsilon=st.floats(0.001, 0.999),
)
def test_hoeffding_bentkus_is_mapies(mean_loss: float, n: int, epsilon: float) -> None:
    """MAPIE takes ceil of the rounded product; so the mean stays clear of whole losses here."""
    if abs(n * mean_loss - round(n * mean_loss)) < 1e-9 * n:
        mean_loss = 0.0
    (theirs,) = compute_hoeffding_bentkus_p_value(np.array([mean_loss]), n, epsilon).ravel()
    ours = risk.hoeffding_bentkus(mean_loss, n, epsilon)
    # MAPIE's product underflows to 0 from about 1e-250 on
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-200)


@pytest.mark.parametrize(
    ("losses", "p"),
    [
        # level exp(-1/4), n = 2: u = 1 while no loss was away from epsilon by other than 1/2, so an
        # image without loss pays 2 / 1.5, one with it 1 / 1.5
        ([0.0, 0.0], 9 / 16),
        ([0.0, 1.0], 3 / 4),
        ([1.0, 0.0], 1.0),
        ([1.0, 1.0], 1.0),
        # After a loss of 1/2: V = 1/8, u = sqrt 2; the first image paid 1.5 / 1.5
        ([0.5, 0.0], (1 + math.sqrt(0.5)) / (1 + math.sqrt(2))),
    ],
)
def test_betting_by_hand(losses: list[float], p: float) -> None:
    actual = risk.betting(np.array(losses), 0.5, level=math.exp(-0.25))
    assert actual == pytest.approx(p, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    epsilon=st.floats(0.01, 0.99),
    level=st.floats(0.01, 0.99),
)
def test_betting_image_by_image(losses: list[float], epsilon: float, level: float) -> None:
    """The capital as the paper writes it, and no bet knows of its own or later images."""
    capital, best, squares = 1.0, 1.0, 0.25
    for t, loss in enumerate(losses, 1):
        u = math.sqrt(2 * math.log(1 / level) * t / (len(losses) * squares))
        bet = u / (1 + u * (1 - epsilon))
        assert 0 <= bet < 1 / (1 - epsilon)
        capital *= 1 - bet * (loss - epsilon)
        best = max(best, capital)
        squares += (loss - epsilon) ** 2
    assert risk.betting(np.array(losses), epsilon, level=level) == pytest.approx(1 / best, rel=1e-9)


# Simulations where the truth is known


def p_value(losses: NDArray[np.float64], epsilon: float, bound: Bound) -> float:
    if bound == "betting":
        return risk.betting(losses, epsilon, level=DELTA)
    return risk.hoeffding_bentkus(float(losses.mean()), len(losses), epsilon)


def _two_valued(rng: np.random.Generator) -> NDArray[np.float64]:
    return (rng.random(400) < 0.05).astype(np.float64)


def _continuous(rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.beta(0.5, 9.5, 400)


def _in_halves(rng: np.random.Generator) -> NDArray[np.float64]:
    """Drops of accuracy: 12 % lost, 7 % rescued, 5 points lost on average."""
    u = rng.random(400)
    return risk.signed_loss((u < 0.12).astype(int) - (u > 0.93).astype(int))


@each_bound
@pytest.mark.parametrize(
    ("draw", "epsilon"),
    [(_two_valued, 0.05), (_continuous, 0.05), (_in_halves, risk.signed_epsilon(0.05))],
)
def test_p_value_at_the_border(bound: Bound, draw: Draw, epsilon: float) -> None:
    """Mean loss epsilon: p <= level at most that often, at the level the bets aim at and others."""
    rng = np.random.default_rng(0)
    p = np.array([p_value(draw(rng), epsilon, bound) for _ in range(RUNS)])
    for level in (0.01, 0.05, DELTA, 0.3):
        assert (p <= level).mean() <= at_most(level, RUNS), (bound, level)


PATHS = {
    "gradual": np.linspace(0.005, 0.115, 12),
    "cliff": np.array([0.005, 0.0501, 0.0501, 0.2]),
    "all bad": np.array([0.0501, 0.06, 0.07]),
    "up and down": np.array([0.01, 0.07, 0.01, 0.3, 0.0]),
}
EPSILON, IMAGES = 0.05, 500


def images_of(risks: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Losses [n, J] of known mean; an image that is easy for one configuration is for all."""
    return (rng.random((IMAGES, 1)) < risks).astype(np.float64)


def chosen_risks(path: str, bound: Bound) -> NDArray[np.float64]:
    """True risk of the configuration chosen in each run, NaN where none was."""
    risks, rng = PATHS[path], np.random.default_rng(0)
    chosen = (
        risk.learn_then_test(images_of(risks, rng), epsilon=EPSILON, delta=DELTA, bound=bound)
        for _ in range(RUNS)
    )
    return np.array([math.nan if j is None else risks[j] for j in chosen])


@each_bound
@pytest.mark.parametrize("path", PATHS)
def test_true_risk_exceeds_epsilon_in_delta_of_the_runs(path: str, bound: Bound) -> None:
    violated = (chosen_risks(path, bound) > EPSILON).mean()
    assert violated <= at_most(DELTA, RUNS)


@each_bound
def test_good_configurations_are_certified(bound: Bound) -> None:
    """Risks 0.005, 0.015, 0.025, …: 0.015 is far enough below 0.05 for 500 images, 0.045 is not."""
    chosen = chosen_risks("gradual", bound)
    assert (chosen >= 0.014).mean() >= 0.95
    assert (chosen >= 0.024).mean() >= 0.7
    assert np.isnan(chosen).mean() <= 0.01


def test_simulation_would_notice_a_rule_without_proof() -> None:
    """The last configuration that looks good enough is too risky in far more than delta runs."""
    risks, rng = PATHS["cliff"], np.random.default_rng(0)
    looks_good = [(images_of(risks, rng).mean(0) <= EPSILON).nonzero()[0] for _ in range(RUNS)]
    violated = np.mean([bool(len(j)) and risks[j[-1]] > EPSILON for j in looks_good])
    assert violated > at_most(DELTA, RUNS) + 0.3


@each_bound
def test_signed_losses_are_controlled(bound: Bound) -> None:
    """Accuracy falls by 0 to 3 points along the path, with rescues; 1 point is allowed."""
    lost, rescued = np.array([0.02, 0.03, 0.0351, 0.05]), np.array([0.03, 0.03, 0.025, 0.02])
    rng, runs, images = np.random.default_rng(0), 2000, 3000
    drops = lost - rescued
    chosen = []
    for _ in range(runs):
        u = rng.random((images, 1))
        losses = risk.signed_loss((u < lost).astype(int) - (u > 1 - rescued).astype(int))
        epsilon = risk.signed_epsilon(0.01)
        j = risk.learn_then_test(losses, epsilon=epsilon, delta=DELTA, bound=bound)
        chosen.append(math.nan if j is None else drops[j])
    assert (np.array(chosen) > 0.01).mean() <= at_most(DELTA, runs)
    if bound == "betting":  # the variance is 1/80; the other bound takes it for 1/4
        assert (~np.isnan(chosen)).mean() >= 0.95


# Learn-then-Test by hand


def columns(*losses_of_100: int) -> NDArray[np.float64]:
    """Each column has its losses spread evenly over 100 images."""
    out = np.zeros((100, len(losses_of_100)))
    for j, count in enumerate(losses_of_100):
        out[np.linspace(0, 99, count).astype(int), j] = 1.0
    return out


@each_bound
@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ((0, 1, 2), 2),
        ((0, 30, 0), 0),  # what comes after the first failure is not looked at
        ((30, 0, 0), None),
        ((), None),
    ],
)
def test_path_ends_at_the_first_failure(
    bound: Bound, counts: tuple[int, ...], chosen: int | None
) -> None:
    losses = columns(*counts)
    assert risk.learn_then_test(losses, epsilon=0.2, delta=0.05, bound=bound) == chosen


def test_delta_decides() -> None:
    """One configuration without a loss in 10 images: p = 0.8**10 = 0.107."""
    losses = np.zeros((10, 1))
    result = [
        risk.learn_then_test(losses, epsilon=0.2, delta=delta, bound="hoeffding_bentkus")
        for delta in (0.1, 0.11)
    ]
    assert result == [None, 0]


def test_bets_aim_at_delta() -> None:
    """34 images without a loss prove 0.2 at delta = 0.01, but only with bets for that delta."""
    losses = np.zeros((34, 1))
    assert risk.betting(losses[:, 0], 0.2, level=0.01) < 0.01 < risk.betting(losses[:, 0], 0.2)
    assert risk.learn_then_test(losses, epsilon=0.2, delta=0.01, bound="betting") == 0


def test_signed_loss_by_hand() -> None:
    assert risk.signed_loss(np.array([-1, 0, 1])).tolist() == [0.0, 0.5, 1.0]
    assert risk.signed_loss(np.array([[1, -1]], np.int8)).tolist() == [[1.0, 0.0]]
    assert risk.signed_epsilon(0.02) == 0.51
    assert risk.signed_epsilon(0.0) == 0.5
    assert risk.signed_epsilon(-0.5) == 0.25
    drops = np.array([1, 0, 0, -1, 1, 0])
    assert risk.signed_loss(drops).mean() == pytest.approx(risk.signed_epsilon(drops.mean()))


# Errors

GOOD = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: risk.hoeffding_bentkus(0.0, 1, 0.0),
            "hoeffding_bentkus: epsilon must be in (0, 1), got 0.0",
        ),
        (
            lambda: risk.hoeffding_bentkus(0.0, 0, 0.1),
            "hoeffding_bentkus: n must be at least 1, got 0",
        ),
        (
            lambda: risk.hoeffding_bentkus(math.nan, 1, 0.1),
            "hoeffding_bentkus: mean_loss must be in [0, 1], got nan",
        ),
        (
            lambda: risk.betting(GOOD[:, 0], 1.0),
            "betting: epsilon must be in (0, 1), got 1.0",
        ),
        (
            lambda: risk.betting(GOOD[:, 0], 0.1, level=math.nan),
            "betting: level must be in (0, 1), got nan",
        ),
        (
            lambda: risk.betting(GOOD, 0.1),
            "betting: losses must have shape [n], n >= 1, got [4, 2]",
        ),
        (
            lambda: risk.betting(np.zeros(0), 0.1),
            "betting: losses must have shape [n], n >= 1, got [0]",
        ),
        (
            lambda: risk.betting(np.array([0.0, 1.5]), 0.1),
            "betting: losses must be in [0, 1], got 1.5",
        ),
        (
            lambda: risk.betting(np.array([0.0, math.nan]), 0.1),
            "betting: losses must be in [0, 1], got nan",
        ),
        (
            lambda: risk.learn_then_test(GOOD, epsilon=2.0, delta=0.1, bound="betting"),
            "learn_then_test: epsilon must be in (0, 1), got 2.0",
        ),
        (
            lambda: risk.learn_then_test(GOOD, epsilon=0.1, delta=0.0, bound="betting"),
            "learn_then_test: delta must be in (0, 1), got 0.0",
        ),
        (
            lambda: risk.learn_then_test(GOOD[:, 0], epsilon=0.1, delta=0.1, bound="betting"),
            "learn_then_test: losses must have shape [n, J], n >= 1, got [4]",
        ),
        (
            lambda: risk.learn_then_test(GOOD - 0.5, epsilon=0.1, delta=0.1, bound="betting"),
            "learn_then_test: losses must be in [0, 1], got -0.5",
        ),
        (
            lambda: risk.learn_then_test(GOOD, epsilon=0.1, delta=0.1, bound="exact"),  # type: ignore[arg-type]
            "learn_then_test: bound must be hoeffding_bentkus or betting, got 'exact'",
        ),
        (
            lambda: risk.signed_loss(np.array([0, 2])),
            "signed_loss: drop must be in [-1, 1], got 2",
        ),
        (
            lambda: risk.signed_loss(np.array([math.nan])),
            "signed_loss: drop must be in [-1, 1], got nan",
        ),
        (
            lambda: risk.signed_epsilon(1.0),
            "signed_epsilon: epsilon must be in (-1, 1), got 1.0",
        ),
    ],
)
def test_errors(run: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run()
    assert str(caught.value) == message


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    message = r"^hoeffding_bentkus: scipy must be installed: pip install 'lraee\[calibrate\]'$"
    with pytest.raises(ImportError, match=message):
        risk.hoeffding_bentkus(0.0, 10, 0.1)
    assert risk.betting(np.zeros(1000), 0.1) < 1e-3
