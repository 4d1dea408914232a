"""Risk control: p-values for "the mean loss exceeds epsilon", and Learn-then-Test along a path.

Losses lie in [0, 1], one per image, of images drawn independently. A p-value p satisfies
P(p <= delta) <= delta for every delta whenever the true mean loss exceeds epsilon.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bound = Literal["hoeffding_bentkus", "betting"]
Losses = NDArray[np.float64]


def hoeffding_bentkus(mean_loss: float, n: int, epsilon: float) -> float:
    """p = min(exp(-n h1(min(r, epsilon), epsilon)), e P(Bin(n, epsilon) <= ceil(n r)), 1).

    h1(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)). As good as if every loss were 0 or 1:
    the p-value knows the mean alone, not the variance.

    Args:
      mean_loss: r in [0, 1], over n images.
      n: at least 1.
      epsilon: in (0, 1).
    Raises: ValueError out of these ranges, ImportError without scipy.
    Source: Angelopoulos et al., Learn then Test, arXiv 2110.01052.
    """
    _require_share("hoeffding_bentkus", "epsilon", epsilon)
    if n < 1:
        raise ValueError(f"hoeffding_bentkus: n must be at least 1, got {n}")
    if not 0.0 <= mean_loss <= 1.0:
        raise ValueError(f"hoeffding_bentkus: mean_loss must be in [0, 1], got {mean_loss}")
    try:
        from scipy.special import bdtr, rel_entr
    except ImportError as error:
        raise ImportError(
            "hoeffding_bentkus: scipy must be installed: pip install 'lraee[calibrate]'"
        ) from error
    if mean_loss >= epsilon:
        return 1.0
    h1 = rel_entr(mean_loss, epsilon) + rel_entr(1.0 - mean_loss, 1.0 - epsilon)
    # 100 * (7 / 100) is 7.000000000000001: 8 losses in place of 7 would triple p at epsilon = 0.2
    losses = math.ceil(n * mean_loss * (1.0 - 2.0**-50))
    return float(min(math.exp(-n * h1), math.e * bdtr(losses, n, epsilon), 1.0))


def betting(losses: Losses, epsilon: float, *, level: float = 0.1) -> float:
    """p = 1 / max_t K_t, where K_t is what a bettor who starts with 1 has after t images.

    Each image pays K_t = K_{t-1} (1 + u_t (1 - loss_t)) / (1 + u_t (1 - epsilon)). A mean loss of
    epsilon or more makes no bet pay on average, whatever u_t >= 0 the bettor picks before seeing
    the image; so by Ville's inequality K ever reaches 1 / p with probability p at most. The pick is

        u_t = sqrt(2 log(1 / level) / (n V_t)),   V_t = (1/4 + sum_{i<t} (loss_i - epsilon)^2) / t

    which grows as the losses spread less: this is where a small variance helps.

    Args:
      losses: [n], in an order that does not depend on them (a data set sorted by class must be
        shuffled first); the p-value depends on the order.
      epsilon: in (0, 1).
      level: where p is to be as often as possible; p is valid at every other level too.
    Raises: ValueError out of these ranges.
    Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, arXiv
      2010.09686: predictable plug-in bets. In their terms the bet is lambda_t = u_t / (1 + u_t (1 -
      epsilon)), always below 1 / (1 - epsilon), in the place of a truncated u_t.
    """
    _require_share("betting", "epsilon", epsilon)
    _require_share("betting", "level", level)
    _require_losses("betting", losses, "[n]")
    n = len(losses)
    squares = np.cumsum((losses - epsilon) ** 2)
    variance = (0.25 + np.append(0.0, squares[:-1])) / np.arange(1, n + 1)
    stake = np.sqrt(2.0 * math.log(1.0 / level) / (n * variance))
    growth = np.log1p(stake * (1.0 - losses)) - np.log1p(stake * (1.0 - epsilon))
    return math.exp(-max(0.0, float(np.cumsum(growth).max())))


def learn_then_test(losses: Losses, *, epsilon: float, delta: float, bound: Bound) -> int | None:
    """The last configuration of a path up to which every one is proven, None if not even the first.

    With probability 1 - delta over the images, the true mean loss of the returned configuration,
    and of every one before it, is at most epsilon.

    Columns are tested in order, each at the full level delta, until one is not rejected. Their
    number costs nothing: let j be the first whose true mean exceeds epsilon. To return j or any
    later one, the test of j must have rejected, and that alone has probability delta at most. How
    columns depend on each other does not matter; but the path must have been laid, and cut to
    length, on other images.

    Args:
      losses: [n, J] in [0, 1]; column j is configuration j, ordered from the safest on.
      epsilon: in (0, 1), the largest mean loss allowed.
      delta: in (0, 1), the largest probability of failing that.
      bound: which p-value. Of losses that are 0 or 1 hoeffding_bentkus proves slightly more, of
        losses that vary less (signed_loss) betting proves far more.
    Returns: an index in 0..J - 1, or None.
    Raises: ValueError out of these ranges; ImportError, see hoeffding_bentkus.
    Source: Angelopoulos et al., Learn then Test, arXiv 2110.01052, fixed sequence testing.
    """
    _require_share("learn_then_test", "epsilon", epsilon)
    _require_share("learn_then_test", "delta", delta)
    _require_losses("learn_then_test", losses, "[n, J]")
    if bound not in ("hoeffding_bentkus", "betting"):
        raise ValueError(
            f"learn_then_test: bound must be hoeffding_bentkus or betting, got {bound!r}"
        )
    proven: int | None = None
    for j, column in enumerate(losses.T):
        if bound == "betting":
            p = betting(column, epsilon, level=delta)
        else:
            p = hoeffding_bentkus(float(column.mean()), len(column), epsilon)
        if p > delta:
            break
        proven = j
    return proven


def signed_loss(drop: NDArray[Any]) -> Losses:
    """(drop + 1) / 2, a loss in [0, 1], to be tested against signed_epsilon.

    Args:
      drop: right at full depth minus right with exits, each 0 or 1: -1, 0 or 1.
    Raises: ValueError on anything outside [-1, 1].
    """
    losses: Losses = (np.asarray(drop, np.float64) + 1.0) / 2.0
    outside = ~((losses >= 0.0) & (losses <= 1.0))  # NaN too
    if outside.any():
        raise ValueError(f"signed_loss: drop must be in [-1, 1], got {drop[outside][0]}")
    return losses


def signed_epsilon(epsilon: float) -> float:
    """(1 + epsilon) / 2: a mean drop of at most epsilon is a mean signed_loss of at most this.

    Args:
      epsilon: in (-1, 1), the largest mean drop in accuracy; a negative one asks for a rise.
    Raises: ValueError out of this range.
    """
    if not -1.0 < epsilon < 1.0:
        raise ValueError(f"signed_epsilon: epsilon must be in (-1, 1), got {epsilon}")
    return (1.0 + epsilon) / 2.0


def _require_share(where: str, name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{where}: {name} must be in (0, 1), got {value}")


def _require_losses(where: str, losses: Losses, shape: str) -> None:
    if losses.ndim != shape.count(",") + 1 or len(losses) == 0:
        got = list(losses.shape)
        raise ValueError(f"{where}: losses must have shape {shape}, n >= 1, got {got}")
    outside = ~((losses >= 0.0) & (losses <= 1.0))  # NaN too
    if outside.any():
        raise ValueError(f"{where}: losses must be in [0, 1], got {losses[outside][0]}")
