"""int8_block for CUDA: seven launches. Float rows are quantized in the launch that made them."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from lraee.kernels.int8_attention import int8_attention_quantized
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import Quantized

Parts = Sequence[Tensor | None]
"""Of a linear: w, w_scale, w_sum, bias or None, and layer_scale where there is one."""


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
    """A whole transformer block; see lraee.block."""
    B, L, D = x.shape
    rows = x.reshape(B * L, D)

    def linear(quantized: Quantized, layer: Parts, residual: Tensor | None) -> Tensor:
        w, w_scale, w_sum, bias, *layer_scale = layer
        assert w is not None and w_scale is not None and w_sum is not None
        return cast(Tensor, int8_linear(
            *quantized, w, w_scale, w_sum, bias, residual=residual,
            layer_scale=layer_scale[0] if layer_scale else None, out_dtype=x.dtype,
        ))  # fmt: skip

    quantized = layer_norm_quantize(rows, *norm_1, eps[0], symmetric[0])
    qkv = linear(quantized, in_proj, None)
    asked = 1 if first_only else L
    quantized = int8_attention_quantized(
        qkv.view(B, L, 3 * D), num_heads, causal, symmetric=symmetric[1], asked=asked
    )
    rows = linear(quantized, out_proj, x[:, 0] if first_only else rows)
    quantized = layer_norm_quantize(rows, *norm_2, eps[1], symmetric[2])
    quantized = int8_linear_quantized(
        *quantized, *c_fc, activation=activation, out_dtype=x.dtype, symmetric=symmetric[3]
    )
    return linear(quantized, c_proj, rows).view(B, asked, D)
