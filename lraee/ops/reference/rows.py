"""Definitions row by row: the fixed order of sums, quantize_rows, layer_norm_quantize."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 64
"""Width of the fixed summation order of `lane_sum`: four AVX-512 registers."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A row whose step would be below the smallest normal float32 counts as a row of zeros."""

Quantized = tuple[Tensor, Tensor, Tensor]


def lane_sum(v: Tensor) -> Tensor:
    """Sum over the last axis in an order that does not depend on the vector width of the machine.

    Lane j adds v[j], v[j + 64], v[j + 128], … starting at +0.0; then the lanes are folded in half,
    64 -> 32 -> … -> 1, by lane[i] += lane[i + half].

    Args:
      v: float32 [..., D].
    Returns: float32 [...].
    """
    lanes = v.new_zeros((*v.shape[:-1], LANES))
    for start in range(0, v.shape[-1], LANES):
        chunk = v[..., start : start + LANES]
        lanes = lanes + F.pad(chunk, (0, LANES - chunk.shape[-1]))
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def divide(v: Tensor, divisor: float) -> Tensor:
    """v / divisor, rounded once: of a Python number torch on CUDA multiplies by the reciprocal.

    Source: aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu, "may lose one bit of precision".
    """
    return v / torch.tensor(divisor, dtype=v.dtype, device=v.device)


def square_root(v: Tensor) -> Tensor:
    """IEEE square root of float32: torch's own is one unit off in 16 % of values (MKL, seen here).

    Through float64, whose rounding cannot reach a tie of float32.
    """
    return torch.sqrt(v.double()).float()


def steady_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of float32 values, each with the same bits wherever it stands in x.

    torch's own computes the last values of a vector by another path, which is one unit off in 3 %
    of them: an image's score would depend on its batch. In float64 the paths are 1e-16 apart, which
    the rounding to float32 hides.
    """
    return torch.sigmoid(x.double()).float()


def quantize_rows(x: Tensor, symmetric: bool) -> Quantized:
    """x ~ (x_q - x_zero) * x_scale with one scale and zero point per row.

    symmetric: x_scale = max|x| / 127, x_zero = 0, x_q = clamp(round(x / x_scale), -127, 127).
    asymmetric: lo = min(0, min x), hi = max(0, max x), x_scale = (hi - lo) / 255,
      x_zero = clamp(round(-128 - lo / x_scale), -128, 127),
      x_q = clamp(round(x / x_scale) + x_zero, -128, 127).
    A step below the smallest normal float32 (so also a row of zeros) becomes 1. A row that holds
    NaN or Inf, or whose step overflows, gets x_scale = NaN, x_zero = 0, x_q = 0: all that is
    computed from that row is NaN, and nothing else changes.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      symmetric: see above.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    """
    x = x.float()
    M, K = x.shape
    if K == 0:
        lo = hi = x.new_zeros(M)
    else:
        lo, hi = x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)
    x_scale = divide(torch.maximum(-lo, hi), 127) if symmetric else divide(hi - lo, 255)
    x_scale = torch.where(x_scale < SMALLEST_SCALE, 1.0, x_scale)
    is_finite = torch.isfinite(x_scale)
    steps = torch.round(x / x_scale[:, None])
    if symmetric:
        x_zero = torch.zeros_like(x_scale)
        x_q = steps.clamp(-127, 127)
    else:
        x_zero = torch.round(-128.0 - lo / x_scale).clamp(-128, 127)
        x_q = (steps + x_zero[:, None]).clamp(-128, 127)
    x_q = torch.where(is_finite[:, None], x_q, 0.0).to(torch.int8).contiguous()
    x_zero = torch.where(is_finite, x_zero, 0.0).to(torch.int32)
    return x_q, torch.where(is_finite, x_scale, math.nan), x_zero


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of float32 [M, D] in the fixed summation order, two passes; RMSNorm without beta.

    RMSNorm takes 0 for the mean: y = (x * rstd) * gamma with rstd = 1 / sqrt(mean(x^2) + eps).
    """
    D = x.shape[1]
    centred = x if beta is None else x - divide(lane_sum(x), D)[:, None]
    variance = divide(lane_sum(centred * centred), D)
    rstd = 1.0 / square_root(variance + torch.tensor(eps, dtype=torch.float32, device=x.device))
    y = (centred * rstd[:, None]) * gamma
    return y if beta is None else y + beta


def layer_norm_quantize(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, symmetric: bool
) -> Quantized:
    """quantize_rows(LayerNorm(x) * gamma + beta).

    mean = lane_sum(x) / D, var = lane_sum((x - mean)^2) / D, y = ((x - mean) * rstd) * gamma + beta
    with rstd = 1 / sqrt(var + eps), all in float32 and each step rounded.

    Args:
      x: float32, bfloat16 or float16 [M, D].
      gamma: float32 [D].
      beta: float32 [D], or None: RMSNorm, see layer_norm.
      eps: added to the variance, rounded to float32.
      symmetric: as in quantize_rows.
    Returns: x_q int8 [M, D], x_scale float32 [M], x_zero int32 [M].
    """
    return quantize_rows(layer_norm(x.float(), gamma, beta, eps), symmetric)
