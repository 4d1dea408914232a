"""Weights rounded against the inputs that they meet, and the range that they are rounded in."""

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the gram's diagonal, added to it."""

_BLOCK = 128
_RATIOS = tuple(1.0 - 0.025 * i for i in range(17))


def upper_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """U float64 [K, K], upper, with U^T U = (gram + damping * mean(diag gram) * I)^-1.

    Args:
      gram: float64 [K, K], positive semi-definite.
      damping: raised tenfold where rounding has left the matrix without a Cholesky factor.
    """
    K = len(gram)
    mean = float(gram.diagonal().mean())
    identity = torch.eye(K, dtype=torch.float64)
    if not mean > 0:
        return identity
    while True:
        lower, info = torch.linalg.cholesky_ex(gram + identity * (damping * mean))
        if not info:
            break
        damping *= 10
    inverse = torch.cholesky_inverse(lower)
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    return identity if info else upper


def round_weight(weight: Tensor, gram: Tensor, w_scale: Tensor, damping: float = DAMPING) -> Tensor:
    """GPTQ: weight ~ w_q * w_scale[:, None], so that x @ weight^T changes little over rows x.

    Column k = 0, 1, … in order: w_q[:, k] = clamp(round(weight[:, k] / w_scale), -127, 127); its
    error, times U[k, j] / U[k, k], is taken from every later column j, so that they make up for it.
    Errors of 128 columns reach the rest in one product.

    Args:
      weight: float32 [N, K].
      gram: float64 [K, K], sum of x^T x over the quantized inputs.
      w_scale: float32 [N].
      damping: see upper_factor.
    Returns: int8 [N, K].
    Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1.
    """
    U = upper_factor(gram, damping).float()
    weight = weight.float().clone()
    N, K = weight.shape
    w_q = torch.empty(N, K, dtype=torch.int8)
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
    return w_q


def search_scale(weight: Tensor, energy: Tensor) -> Tensor:
    """Per output, the range among 60 % .. 100 % of max|row| with the least error, w_scale [N].

    The error is that of rounding to nearest, each column weighed by its input's energy.

    Args:
      weight: float32 [N, K].
      energy: float [K], mean square of each input.
    """
    full = weight.abs().amax(1) / 127
    full = torch.where(full < torch.finfo(torch.float32).tiny, 1.0, full)
    energy = energy.float()
    best, least = full, torch.full_like(full, torch.inf)
    for ratio in _RATIOS:
        scale = full * ratio
        steps = torch.round(weight / scale[:, None]).clamp_(-127, 127)
        error = (steps.mul_(scale[:, None]).sub_(weight)).square_() @ energy
        is_better = error < least
        best, least = torch.where(is_better, scale, best), torch.where(is_better, error, least)
    return best
