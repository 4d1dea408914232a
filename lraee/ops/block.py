"""One int8 transformer block as one operator: the definition, from the operators that it fuses."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lraee.ops import reference

Parts = Sequence[Tensor | None]
"""Of a linear: packed w, w_scale, w_sum, bias or None, and layer_scale where there is one."""


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
    *,
    operators: Any = reference,
) -> Tensor:
    """x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))), in seven operators.

    Args:
      x: float32, bfloat16 or float16 [B, L, D].
      norm_1, norm_2: gamma and beta, float32 [D].
      in_proj: [D] -> [3 D], queries, keys, values.
      out_proj, c_proj: back to [D]; their layer_scale is ls_1 and ls_2.
      c_fc: [D] -> [hidden].
      eps: of the two norms.
      symmetric: per linear, in the order above, whether its input has no zero point.
      num_heads: H, a divisor of D.
      causal: token i sees tokens 0..i only.
      activation: between c_fc and c_proj, see int8_linear.
      first_only: the first token of each image is asked for alone: the others are keys and values
        to it, and go no further.
      operators: what the seven run on: the definitions, or torch.ops.lraee.
    Returns: [B, L, D] in the type of x, or of that the first token [B, 1, D], the same bits. Image
      b depends on image b alone.
    """
    B, L, D = x.shape
    rows = x.reshape(B * L, D)

    def normed(rows: Tensor, place: int, norm: Sequence[Tensor], site: int) -> Any:
        return operators.layer_norm_quantize(rows, *norm, eps[place], symmetric[site])

    def multiply(quantized: Any, linear: Parts, residual: Tensor | None, activation: str) -> Tensor:
        scale = linear[4] if len(linear) > 4 else None
        return operators.int8_linear(  # type: ignore[no-any-return]
            *quantized, *linear[:4], residual=residual, layer_scale=scale, activation=activation,
            out_dtype=x.dtype,
        )  # fmt: skip

    qkv = multiply(normed(rows, 0, norm_1, 0), in_proj, None, "none")
    y = operators.int8_attention(qkv.view(B, L, 3 * D), num_heads, causal)
    y, rows = (y[:, 0], x[:, 0]) if first_only else (y.view(B * L, D), rows)
    rows = multiply(operators.quantize_rows(y, symmetric[1]), out_proj, rows, "none")
    y = multiply(normed(rows, 1, norm_2, 2), c_fc, None, activation)
    rows = multiply(operators.quantize_rows(y, symmetric[3]), c_proj, rows, "none")
    return rows.view(B, 1 if first_only else L, D)
