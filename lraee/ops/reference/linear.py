"""Definitions of the linear layers: pack_weight, int8_linear, float_linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.kernels.operands import PackedLinear

MAX_K = 65_793
"""Longest exact int32 sum: 255 * 128 * K < 2**31."""


def pack_weight(w_q: Tensor) -> tuple[Tensor, Tensor]:
    """The plain layout: w = w_q itself [N, K], and w_sum[n] = sum_k w_q[n, k].

    Args:
      w_q: int8 [N, K].
    Returns: w int8 [N, K], w_sum int32 [N].
    """
    return w_q.clone(memory_format=torch.contiguous_format), w_q.sum(1, dtype=torch.int32)


def unpack_weight(w: Tensor, N: int, K: int) -> Tensor:
    """The inverse of pack_weight: int8 [N, K] from the plain layout."""
    _require_plain("unpack_weight", w, N, K)
    return w.clone(memory_format=torch.contiguous_format)


def _require_plain(op: str, w: Tensor, N: int, K: int) -> None:
    if w.shape != (N, K):
        raise ValueError(
            f"{op}: w must have the plain layout [N, K] = [{N}, {K}] that the reference reads,"
            f" got {list(w.shape)}; pack it with the implementation that reads it"
        )


def activate(y: Tensor, activation: str) -> Tensor:
    """none: y; gelu: y * Phi(y); gelu_tanh: its tanh form; quick_gelu: y * sigmoid(1.702 y)."""
    if activation == "none":
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    raise ValueError(
        "int8_linear: activation must be none, gelu, gelu_tanh or quick_gelu, got " + activation
    )


def integer_product(x_q: Tensor, w_q: Tensor) -> Tensor:
    """x_q @ w_q^T as int32. Exact: float64 holds every partial sum of int8 products up to 2**53."""
    return (x_q.double() @ w_q.double().transpose(-1, -2)).to(torch.int32)


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q: int8 [M, K].
      x_scale: float32 [M], real value of one step of x_q.
      x_zero: int32 [M], the integer that stands for 0; None means 0 in every row.
      linear: see PackedLinear; w int8 [N, K] (plain layout).
      residual: out_dtype [M, N] or None.
      activation: none, gelu (erf), gelu_tanh or quick_gelu.
      out_dtype: float32, bfloat16 or float16.
    Returns: out_dtype [M, N].
    Accumulates in int32, exact for K <= 65_793. Epilogue in float32, each step rounded.
    """
    M, K = x_q.shape
    w, w_scale, w_sum, bias, layer_scale = linear
    N = linear.N
    _require_plain("int8_linear", w, N, K)
    acc = integer_product(x_q, w) if K else x_q.new_zeros((M, N), dtype=torch.int32)
    if x_zero is not None:
        acc = acc - x_zero[:, None] * w_sum
    y = acc.float() * (x_scale[:, None] * w_scale)
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    if layer_scale is not None:
        y = y * layer_scale
    if residual is not None:
        y = y + residual.float()
    result: Tensor = y.to(out_dtype)
    return result


def float_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w.T + bias with each output summed in one fixed order, k = 0, 1, 2, …

    The float layers around the blocks (patch embedding, projection) use it: a library's matrix
    product may choose another order for another batch size, and then an image's bits change.

    Args:
      x: float32 [M, K].
      w: float32 [N, K].
      bias: float32 [N] or None; the sum starts there.
    Returns: float32 [M, N]. Implementations may fuse each product with its addition.
    """
    M, N = x.shape[0], w.shape[0]
    y = x.new_zeros((M, N)) if bias is None else bias.expand(M, N)
    y = y.clone(memory_format=torch.contiguous_format)
    for k in range(x.shape[1]):
        y = y + x[:, k : k + 1] * w[:, k]
    return y
