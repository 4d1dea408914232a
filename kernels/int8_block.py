"""int8_block for CUDA: nine launches, or seven of few rows (see row_configs.quantizes_its_rows)."""

from torch import Tensor

from lraee.kernels import device
from lraee.kernels.float_attention import float_attention, float_attention_quantized
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.operands import AttentionOperands, BlockOperands
from lraee.kernels.quantize_rows import Quantized, quantize_rows
from lraee.kernels.row_configs import quantizes_its_rows


def int8_block(x: Tensor, block: BlockOperands, first_only: bool = False) -> Tensor:
    """A whole transformer block; see lraee.ops.reference."""
    B, L, D = x.shape
    rows, dtype, symmetric = x.reshape(B * L, D), x.dtype, block.symmetric
    num_queries = 1 if first_only else L

    quantized = layer_norm_quantize(rows, *block.norm_1, symmetric[0])
    qkv = int8_linear(*quantized, block.in_proj, out_dtype=dtype).view(B, L, 3 * D)
    quantized = _attend(qkv, block, num_queries)
    rows = x[:, 0] if first_only else rows
    rows = int8_linear(*quantized, block.out_proj, residual=rows, out_dtype=dtype)
    quantized = layer_norm_quantize(rows, *block.norm_2, symmetric[2])
    if quantizes_its_rows(len(rows), block.c_fc.N, device.arch(x.device)):
        quantized = int8_linear_quantized(
            *quantized, block.c_fc, symmetric=symmetric[3], activation=block.activation,
            out_dtype=dtype,
        )  # fmt: skip
    else:
        wide = int8_linear(*quantized, block.c_fc, activation=block.activation, out_dtype=dtype)
        quantized = quantize_rows(wide, symmetric[3])
    y: Tensor = int8_linear(*quantized, block.c_proj, residual=rows, out_dtype=dtype)
    return y.view(B, num_queries, D)


def _attend(qkv: Tensor, block: BlockOperands, num_queries: int) -> Quantized:
    """Attention of the first tokens, its rows quantized."""
    M, D, symmetric = len(qkv) * num_queries, qkv.shape[2] // 3, block.symmetric[1]
    operands = AttentionOperands(block.num_heads, block.causal, key_mask=block.key_mask)
    if block.attention == "float" and quantizes_its_rows(M, D, device.arch(qkv.device)):
        return float_attention_quantized(
            qkv, operands, symmetric=symmetric, num_queries=num_queries
        )
    attend = float_attention if block.attention == "float" else int8_attention
    return quantize_rows(attend(qkv, *operands, num_queries=num_queries).view(M, D), symmetric)
