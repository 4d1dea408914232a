"""Definition of int8_block, from the operators that it fuses."""

from typing import Any

from torch import Tensor

from lraee.kernels.operands import BlockOperands, Norm, PackedLinear
from lraee.ops.reference.attention import int8_attention
from lraee.ops.reference.linear import int8_linear
from lraee.ops.reference.rows import layer_norm_quantize, quantize_rows


class Definitions:
    """The operators of a block, each its definition."""

    quantize_rows = staticmethod(quantize_rows)
    layer_norm_quantize = staticmethod(layer_norm_quantize)
    int8_linear = staticmethod(int8_linear)
    int8_attention = staticmethod(int8_attention)


def int8_block(
    x: Tensor, block: BlockOperands, first_only: bool = False, *, operators: Any = Definitions
) -> Tensor:
    """x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))), in seven operators.

    Args:
      x: float32, bfloat16 or float16 [B, L, D].
      block: see BlockOperands.
      first_only: compute the first token of each image alone: the others are keys and values to it,
        and go no further.
      operators: what the seven run on: the definitions, or lraee.ops.backend.operators.
    Returns: [B, L, D] in the type of x, or of that the first token [B, 1, D], the same bits. Image
      b depends on image b alone.
    """
    B, L, D = x.shape
    symmetric = block.symmetric

    def normed(rows: Tensor, norm: Norm, site: int) -> Any:
        return operators.layer_norm_quantize(rows, *norm, symmetric[site])

    def multiply(
        quantized: Any, linear: PackedLinear, residual: Tensor | None, activation: str = "none"
    ) -> Tensor:
        return operators.int8_linear(  # type: ignore[no-any-return]
            *quantized, linear, residual=residual, activation=activation, out_dtype=x.dtype
        )

    rows = x.reshape(B * L, D)
    qkv = multiply(normed(rows, block.norm_1, 0), block.in_proj, None)
    y = operators.int8_attention(qkv.view(B, L, 3 * D), block.num_heads, block.causal)
    y, rows = (y[:, 0], x[:, 0]) if first_only else (y.view(B * L, D), rows)
    rows = multiply(operators.quantize_rows(y, symmetric[1]), block.out_proj, rows)
    y = multiply(normed(rows, block.norm_2, 2), block.c_fc, None, block.activation)
    rows = multiply(operators.quantize_rows(y, symmetric[3]), block.c_proj, rows)
    return rows.view(B, 1 if first_only else L, D)
