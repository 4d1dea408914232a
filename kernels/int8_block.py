"""int8_block for CUDA: seven launches.

Float rows are quantized in the launch that made them.
"""

from torch import Tensor

from lraee.kernels.int8_attention import int8_attention_quantized
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.operands import AttentionOperands, BlockOperands


def int8_block(x: Tensor, block: BlockOperands, first_only: bool = False) -> Tensor:
    """A whole transformer block; see lraee.ops.reference."""
    y: Tensor
    B, L, D = x.shape
    rows, dtype, symmetric = x.reshape(B * L, D), x.dtype, block.symmetric
    num_queries = 1 if first_only else L

    quantized = layer_norm_quantize(rows, *block.norm_1, symmetric[0])
    qkv = int8_linear(*quantized, block.in_proj, out_dtype=dtype).view(B, L, 3 * D)
    attention = AttentionOperands(block.num_heads, block.causal, key_mask=block.key_mask)
    quantized = int8_attention_quantized(
        qkv, attention, symmetric=symmetric[1], num_queries=num_queries
    )
    rows = x[:, 0] if first_only else rows
    rows = int8_linear(*quantized, block.out_proj, residual=rows, out_dtype=dtype)
    quantized = layer_norm_quantize(rows, *block.norm_2, symmetric[2])
    quantized = int8_linear_quantized(
        *quantized, block.c_fc, symmetric=symmetric[3], activation=block.activation,
        out_dtype=dtype,
    )  # fmt: skip
    y = int8_linear(*quantized, block.c_proj, residual=rows, out_dtype=dtype)
    return y.view(B, num_queries, D)
