"""int8_block for CUDA: seven launches while few rows make launches dear, nine beyond that."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lraee.kernels import device
from lraee.kernels.configs import quantizes_together
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.int8_linear import int8_linear, int8_linear_from_float
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows

Parts = Sequence[Tensor | None]
"""Of a linear: w, w_scale, w_sum, bias or None, and layer_scale where there is one."""


def _project(
    y: Tensor, symmetric: bool, linear: Parts, residual: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """linear(y) * layer_scale + residual of float rows: one launch, or two with quantize_rows."""
    w, w_scale, w_sum, bias, layer_scale = linear
    assert w is not None and w_scale is not None and w_sum is not None
    if quantizes_together(y.shape[0], device.arch(y.device)):
        return cast(Tensor, int8_linear_from_float(
            y, symmetric, w, w_scale, w_sum, bias,
            residual=residual, layer_scale=layer_scale, out_dtype=out_dtype,
        ))  # fmt: skip
    return cast(Tensor, int8_linear(
        *quantize_rows(y, symmetric), w, w_scale, w_sum, bias,
        residual=residual, layer_scale=layer_scale, out_dtype=out_dtype,
    ))  # fmt: skip


def int8_block(
    x: Tensor,
    norm_1: Sequence[Tensor],
    in_proj: Parts,
    out_proj: Parts,
    norm_2: Sequence[Tensor],
    c_fc: Parts,
    c_proj: Parts,
    eps: Sequence[float],
    symmetric: Sequence[bool],
    num_heads: int,
    causal: bool,
    activation: str,
    first_only: bool = False,
) -> Tensor:
    """A whole transformer block; see lraee.block. The same bits by either number of launches."""
    B, L, D = x.shape
    rows = x.reshape(B * L, D)
    quantized = layer_norm_quantize(rows, *norm_1, eps[0], symmetric[0])
    qkv = int8_linear(*quantized, *in_proj, out_dtype=x.dtype)
    asked = 1 if first_only else L
    y = int8_attention(qkv.view(B, L, 3 * D), num_heads, causal, asked=asked).view(B * asked, D)
    rows = x[:, 0] if first_only else rows
    rows = _project(y, symmetric[1], out_proj, rows, x.dtype)
    quantized = layer_norm_quantize(rows, *norm_2, eps[1], symmetric[2])
    y = int8_linear(*quantized, *c_fc, activation=activation, out_dtype=x.dtype)
    rows = _project(y, symmetric[3], c_proj, rows, x.dtype)
    return rows.view(B, asked, D)
