"""Definition of int8_block, from the operators that it fuses."""

from typing import Any

from torch import Tensor

from lraee.kernels.operands import BlockOperands
from lraee.ops.reference.attention import float_attention, int8_attention
from lraee.ops.reference.linear import int8_linear
from lraee.ops.reference.rows import layer_norm_quantize, quantize_rows


class Definitions:
    """The operators of a block, each its definition."""

    quantize_rows = staticmethod(quantize_rows)
    layer_norm_quantize = staticmethod(layer_norm_quantize)
    int8_linear = staticmethod(int8_linear)
    int8_attention = staticmethod(int8_attention)
    float_attention = staticmethod(float_attention)


def int8_block(
    x: Tensor, block: BlockOperands, first_only: bool = False, *, operators: Any = Definitions
) -> Tensor:
    """x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))), operator by operator.

    Args:
      x: float32, bfloat16 or float16 [B, L, D].
      block: see BlockOperands.
      first_only: compute the first token of each image alone: the others are keys and values to it,
        and go no further.
      operators: what it runs on: the definitions, or lraee.ops.backend.operators.
    Returns: [B, L, D] in the type of x, or of that the first token [B, 1, D], the same bits. Image
      b depends on image b alone.
    """
    B, L, D = x.shape
    rows, symmetric = x.reshape(B * L, D), block.symmetric

    def linear(quantized: Any, weight: Any, **options: Any) -> Any:
        return operators.int8_linear(*quantized, weight, out_dtype=x.dtype, **options)

    quantized = operators.layer_norm_quantize(rows, *block.norm_1, symmetric[0])
    qkv = linear(quantized, block.in_proj).view(B, L, 3 * D)
    is_float = block.attention == "float"
    attend = operators.float_attention if is_float else operators.int8_attention
    y = attend(qkv, block.num_heads, block.causal, None, block.key_mask)
    y, rows = (y[:, 0], x[:, 0]) if first_only else (y.view(B * L, D), rows)
    quantized = operators.quantize_rows(y, symmetric[1])
    rows = linear(quantized, block.out_proj, residual=rows)
    quantized = operators.layer_norm_quantize(rows, *block.norm_2, symmetric[2])
    y = linear(quantized, block.c_fc, activation=block.activation)
    quantized = operators.quantize_rows(y, symmetric[3])
    y = linear(quantized, block.c_proj, residual=rows)
    return y.view(B, 1 if first_only else L, D)  # type: ignore[no-any-return]
