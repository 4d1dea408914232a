"""Fitting of gates by logistic regression, on the gate split."""

import torch
from torch import Tensor

from lraee.calibration.scoring import NO_WEIGHTS, ExitTable, Subset, Weights
from lraee.exits.gate import GateKind, unit
from lraee.ops.reference import lane_sum


def require_scikit_learn() -> None:
    """Raises ImportError, one line, where it is missing; called before minutes of work."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"calibrate: scikit-learn must be installed: pip install 'lraee[calibrate]' ({error})"
        ) from error


def fit_weights(kind: GateKind, split: ExitTable, subset: Subset) -> tuple[Weights, ...]:
    """The gate of each exit of the subset, fitted on the split."""
    rows = []
    for place, e in enumerate(subset):
        right = split.is_correct[:, e]
        if kind == "learned":
            w, b = fit_logistic(split.features[:, e], right)
            rows.append((float(w[0]), float(w[1]), float(w[2]), b))
        elif kind == "agreement" and place:
            before = unit(split.embedding[:, subset[place - 1]])
            cosine = lane_sum(unit(split.embedding[:, e]) * before)
            w, b = fit_logistic(torch.stack([cosine, split.features[:, e, 2]], 1), right)
            rows.append((float(w[0]), 0.0, float(w[1]), b))
        else:
            rows.append(NO_WEIGHTS)
    return tuple(rows)


def fit_logistic(features: Tensor, is_right: Tensor) -> tuple[Tensor, float]:
    """w, b of P(right) = sigmoid(features @ w + b), by scikit-learn on standardised features.

    The mean and spread of each feature are folded back, so that the gate stays a few scalars.

    Args:
      features: [n, F]; rows that are not finite are left out.
      is_right: bool [n].
    Returns: w float64 [F] and b. Where all rows agree there is nothing to learn: w = 0 and b is
      the log odds of the share with one row of each kind added.
    Raises: ImportError if scikit-learn is missing.
    """
    require_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    finite = features.isfinite().all(1)
    x, y = features[finite].double(), is_right[finite]
    right, count = int(y.sum()), len(y)
    if right in (0, count):
        odds = torch.tensor((right + 1) / (count - right + 1), dtype=torch.float64)
        return x.new_zeros(features.shape[1]), float(odds.log())
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=1e4, max_iter=1000)
    model.fit(((x - mean) / spread).numpy(), y.numpy())
    w = torch.from_numpy(model.coef_[0]) / spread
    return w, float(model.intercept_[0] - (w * mean).sum())
