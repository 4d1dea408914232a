"""Weights rounded against the inputs that they meet, and the range that they are rounded in."""

import torch
from torch import Tensor

DAMPING = 0.001
"""Of the mean of the gram's diagonal, added to it."""

_BLOCK = 128
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Ranges that are tried, of the largest weight of a row."""
SWEEPS = 2
"""Of coordinate descent, after GPTQ: they take the loss down by a fifth, further ones by little."""


def factor(gram: Tensor, damping: float) -> Tensor | None:
    """L float64 [K, K], lower, with L L^T = gram + damping * mean(diag gram) * I.

    Args:
      gram: float64 [K, K], positive semi-definite.
    Returns: None where rounding has left the matrix without a Cholesky factor.
    """
    lower, info = torch.linalg.cholesky_ex(_damped(gram, damping))
    return None if info else lower


def upper_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """U float64 [K, K], upper, with U^T U = (gram + damping * mean(diag gram) * I)^-1.

    With rows and columns in reverse order gram = L L^T, so that as it stands gram = R R^T with R
    upper, and U = R^-1.

    Args:
      gram: float64 [K, K], positive semi-definite.
      damping: raised tenfold where rounding has left the matrix without a Cholesky factor.
    """
    identity = torch.eye(len(gram), dtype=torch.float64)
    if not _mean(gram) > 0:
        return identity
    while (lower := factor(gram.flip(0, 1), damping)) is None:
        damping *= 10
    U: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return U


def round_weight(weight: Tensor, gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The int8 weight, w_q * w_scale[:, None], for whose inputs' gram x @ weight^T changes least.

    Per output row, the range among RATIOS of max|row| whose rounding by GPTQ loses least; then
    coordinate descent from there.

    Args:
      weight: float32 [N, K].
      gram: float64 [K, K], sum of x^T x over the quantized inputs.
      damping: see upper_factor.
    Returns: w_q int8 [N, K], w_scale float32 [N].
    """
    U = upper_factor(gram, damping).float()
    full = weight.abs().amax(1) / 127
    full = torch.where(full < torch.finfo(torch.float32).tiny, 1.0, full)
    best_scale = full
    best_q, least = gptq(weight, U, full)
    for ratio in RATIOS[1:]:
        w_q, loss = gptq(weight, U, full * ratio)
        is_better = loss < least
        best_q[is_better] = w_q[is_better]
        best_scale = torch.where(is_better, full * ratio, best_scale)
        least = torch.where(is_better, loss, least)
    damped = _damped(gram, damping).float()
    for _ in range(SWEEPS):
        best_q = descend(weight, damped, best_q, best_scale)
    return best_q, best_scale


def descend(weight: Tensor, gram: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """The int8 weight after one sweep of coordinate descent on d gram d^T, per row d of the
    difference.

    Column k = 0, 1, … in order takes the step that is best while all others stay. Changes of 128
    columns reach the rest in one product.

    Args:
      weight: float32 [N, K].
      gram: float32 [K, K].
      w_q: int8 [N, K], where it begins.
      w_scale: float32 [N].
    Returns: int8 [N, K].
    Source: Behdin et al., QuantEase, arXiv 2309.01885.
    """
    K = weight.shape[1]
    steps = w_q.T.float()  # rows of a column lie together
    slopes = gram @ (steps * w_scale - weight.T)
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        inner, slope = gram[start:end, start:end], slopes[start:end].clone()
        before = steps[start:end].clone()
        for k in range(end - start):
            if not inner[k, k] > 0:
                continue
            old = steps[start + k]
            new = torch.round(old - slope[k] / (inner[k, k] * w_scale)).clamp_(-127, 127)
            slope[k + 1 :] += inner[k, k + 1 :, None] * ((new - old) * w_scale)
            steps[start + k] = new
        slopes += gram[:, start:end] @ ((steps[start:end] - before) * w_scale)
    return steps.T.contiguous().to(torch.int8)


def _mean(gram: Tensor) -> float:
    return float(gram.diagonal().mean())


def _damped(gram: Tensor, damping: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(damping * _mean(gram))
    return damped


def gptq(weight: Tensor, U: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ~ w_q * w_scale[:, None], rounded column by column.

    Column k = 0, 1, … in order: w_q[:, k] = clamp(round(weight[:, k] / w_scale), -127, 127); its
    error, times U[k, j] / U[k, k], is taken from every later column j, so that they make up for it.
    Errors of 128 columns reach the rest in one product.

    Args:
      weight: float32 [N, K].
      U: float32 [K, K], from upper_factor.
      w_scale: float32 [N].
    Returns: w_q int8 [N, K]; the loss, d (gram + damping) d^T per row d of the difference, [N].
    Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1.
    """
    weight = weight.float().clone()
    N, K = weight.shape
    w_q = torch.empty(N, K, dtype=torch.int8)
    loss = torch.zeros(N)
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        columns = weight[:, start:end].T.contiguous()  # rows of a column lie together
        errors = torch.empty_like(columns)
        inner = U[start:end, start:end]
        for k in range(end - start):
            steps = torch.round(columns[k] / w_scale).clamp_(-127, 127)
            w_q[:, start + k] = steps.to(torch.int8)
            errors[k] = (columns[k] - steps * w_scale) / inner[k, k]
            columns[k + 1 :] -= inner[k, k + 1 :, None] * errors[k]
        weight[:, end:] -= errors.T @ U[start:end, end:]
        loss += errors.square().sum(0)
    return w_q, loss
