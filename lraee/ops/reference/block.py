"""Definition of int8_block, from the operators that it fuses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.kernels.operands import BlockOperands, Norm, PackedLinear
from lraee.ops.reference.attention import int8_attention
from lraee.ops.reference.gated import gated_quantize
from lraee.ops.reference.linear import int8_linear
from lraee.ops.reference.rows import layer_norm_quantize, quantize_rows


class Definitions:
    """The operators of a block, each its definition."""

    quantize_rows = staticmethod(quantize_rows)
    layer_norm_quantize = staticmethod(layer_norm_quantize)
    gated_quantize = staticmethod(gated_quantize)
    int8_linear = staticmethod(int8_linear)
    int8_attention = staticmethod(int8_attention)


def int8_block(
    x: Tensor, block: BlockOperands, first_only: bool = False, *, operators: Any = Definitions
) -> Tensor:
    """x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))), operator by operator.

    Args:
      x: float32, bfloat16 or float16 [B, L, D].
      block: see BlockOperands. Post-norm, qk norms and a norm behind attention run this way on
        every device; norms of whole tokens or heads that are not quantized are torch's.
      first_only: compute the first token of each image alone: the others are keys and values to it,
        and go no further.
      operators: what it runs on: the definitions, or lraee.ops.backend.operators.
    Returns: [B, L, D] in the type of x, or of that the first token [B, 1, D], the same bits. Image
      b depends on image b alone.
    """
    parts = _Parts(block, operators, x.dtype)
    B, L, D = x.shape
    rows = x.reshape(B * L, D)
    qkv = parts.linear(parts.normed(rows, block.norm_1, 0), block.in_proj)
    y = parts.attend(qkv.view(B, L, 3 * D))
    y, rows = (y[:, 0], x[:, 0]) if first_only else (y.view(B * L, D), rows)
    norm = block.attention_norm
    quantized = (
        operators.quantize_rows(y, block.symmetric[1])
        if norm is None
        else operators.layer_norm_quantize(y, *norm, block.symmetric[1])
    )
    rows = parts.added(rows, quantized, block.out_proj, block.norm_1)
    y = parts.linear(
        parts.normed(rows, block.norm_2, 2), block.c_fc,
        activation="none" if block.gated else block.activation,
    )  # fmt: skip
    if block.gated:
        *quantized, r_q, r_scale = operators.gated_quantize(
            y, block.activation, *(block.mlp_norm or ())
        )
        rest = (r_q, r_scale, None)
    else:
        quantized, rest = operators.quantize_rows(y, block.symmetric[3]), None
    rows = parts.added(rows, quantized, block.c_proj, block.norm_2, rest)
    return rows.view(B, 1 if first_only else L, D)


class _Parts:
    """The steps of a block, with the operators that they run on."""

    def __init__(self, block: BlockOperands, operators: Any, dtype: torch.dtype) -> None:
        self.block, self.operators, self.dtype = block, operators, dtype

    def normed(self, rows: Tensor, norm: Norm, site: int) -> Any:
        """The quantized input of a linear: of the norm of rows, or of rows where it comes after."""
        symmetric = self.block.symmetric[site]
        if self.block.has_post_norm:
            return self.operators.quantize_rows(rows, symmetric)
        return self.operators.layer_norm_quantize(rows, *norm, symmetric)

    def linear(self, quantized: Any, linear: PackedLinear, **options: Any) -> Tensor:
        y: Tensor = self.operators.int8_linear(*quantized, linear, out_dtype=self.dtype, **options)
        return y

    def attend(self, qkv: Tensor) -> Tensor:
        block = self.block
        if block.qk_norms is not None:
            heads = qkv.view(*qkv.shape[:2], 3, block.num_heads, -1)
            q, k, v = heads.unbind(2)
            q, k = (_float_norm(t, norm) for t, norm in zip((q, k), block.qk_norms, strict=True))
            qkv = torch.stack([q, k, v], 2).view(qkv.shape)
        y: Tensor = self.operators.int8_attention(
            qkv, block.num_heads, block.causal, block.rope, block.key_mask
        )
        return y

    def added(
        self, rows: Tensor, quantized: Any, linear: PackedLinear, norm: Norm, rest: Any = None
    ) -> Tensor:
        """rows + the linear's output, normed first in a post-norm block.

        rest: a second term of its input, which is added to rows before; bias belongs to the first.
        """
        if not self.block.has_post_norm:
            if rest is not None:
                rows = self.linear(rest, linear._replace(bias=None), residual=rows)
            return self.linear(quantized, linear, residual=rows)
        plain = linear._replace(layer_scale=None)
        y = None if rest is None else self.linear(rest, plain._replace(bias=None))
        y = _float_norm(self.linear(quantized, plain, residual=y), norm)
        return rows + (y if linear.layer_scale is None else y * linear.layer_scale.to(y.dtype))


def _float_norm(x: Tensor, norm: Norm) -> Tensor:
    gamma, beta, eps = norm
    shape, gamma = gamma.shape, gamma.to(x.dtype)
    if beta is None:
        return F.rms_norm(x, shape, gamma, eps)
    return F.layer_norm(x, shape, gamma, beta.to(x.dtype), eps)
