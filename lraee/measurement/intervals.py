"""95 % intervals of shares and means over photos."""

import math

from torch import Tensor

Interval = tuple[float, float]
_Z = 1.959964


def of_share(hits: int, n: int) -> Interval:
    """Wilson's interval of a share, hits of n: within 0 and 1, also at 0 and n hits.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    share, z = hits / n, _Z**2 / n
    centre = (share + z / 2) / (1 + z)
    half = _Z * math.sqrt(share * (1 - share) / n + z / (4 * n)) / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)


def of_mean_share(values: Tensor) -> Interval:
    """mean +- 1.96 standard errors of shares [n], within 0 and 1; one value has no width."""
    mean = float(values.double().mean())
    if len(values) < 2:
        return mean, mean
    half = _Z * float(values.double().std()) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)
