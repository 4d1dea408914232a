"""Definition of gated_quantize."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.ops.reference.linear import activate
from lraee.ops.reference.rows import SMALLEST_SCALE, divide, layer_norm, quantize_rows

GatedRows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gated_quantize(
    x: Tensor,
    activation: str,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 0.0,
) -> GatedRows:
    """v = act(x[:, :H]) * x[:, H:] in two terms of int8: (x_q - x_zero) * x_scale + r_q * r_scale.

    A row of SwiGLU has a few large values: in one term its error is 3.3 times that of a GELU's.
    v passes through LayerNorm (RMSNorm where beta is None) where gamma is given.
    x_q, x_scale, x_zero = quantize_rows(v, asymmetric); rest = v - (x_q - x_zero) * x_scale;
    r_scale = x_scale / 254, r_q = clamp(round(rest / r_scale), -127, 127): |v - both terms| is at
    most x_scale / 508 but for rounding. An r_scale below the smallest normal float32 becomes 1. A
    row that holds NaN or Inf has both scales NaN and q = 0.

    Args:
      x: float32, bfloat16 or float16 [M, 2 H]: gate, then up part.
      activation: none, silu, gelu, gelu_tanh or quick_gelu.
      gamma, beta: float32 [H] or None; eps: added to the variance.
    Returns: x_q int8 [M, H], x_scale float32 [M], x_zero int32 [M], r_q int8 [M, H], r_scale
      float32 [M].
    """
    gate, up = x.float().chunk(2, 1)
    v = (F.silu(gate) if activation == "silu" else activate(gate, activation)) * up
    if gamma is not None:
        v = layer_norm(v, gamma, beta, eps)
    x_q, x_scale, x_zero = quantize_rows(v, False)
    r_scale = divide(x_scale, 254)
    r_scale = torch.where(r_scale < SMALLEST_SCALE, 1.0, r_scale)
    rest = v - (x_q.float() - x_zero.float()[:, None]) * x_scale[:, None]
    steps = torch.round(rest / r_scale[:, None]).clamp(-127, 127)
    r_q = torch.where(x_scale.isfinite()[:, None], steps, 0.0).to(torch.int8)
    return x_q, x_scale, x_zero, r_q, torch.where(x_scale.isfinite(), r_scale, math.nan)
