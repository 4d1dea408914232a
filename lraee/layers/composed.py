"""A block that is more than the operator int8_block computes: its operators, one after the other.

Rotary positions, norms inside attention and MLP, gated MLPs, RMSNorm and norms after the branches.
Every step works row by row, so an image has the same bits in any batch. Activations are computed by
int8_linear and gated_quantize: torch's own end a thread's share of a tensor with scalar code, whose
bits are others.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.int8_linear import Int8Linear
from lraee.layers.spec import Linear, Norm
from lraee.layers.watch import Place, Watch, place_of
from lraee.ops.backend import operators
from lraee.ops.checked import Activation
from lraee.ops.reference import Quantized

if TYPE_CHECKING:
    from lraee.layers.int8_attention import Int8Attention
    from lraee.layers.int8_block import Int8Block


class Composed(Watch):
    """The steps of one block; called with its tokens.

    Args:
      block: one whose linears are all int8 and by row.
    """

    def __init__(self, block: "Int8Block") -> None:
        """See the class."""
        super().__init__(block)
        spec = block.block_spec
        self._spec = spec
        self._backend = block.int8_backend
        self._modules = {linear.path: _linear(block, linear) for linear in spec.linears}
        paths = (spec.norm_1.path, spec.norm_2.path, spec.attention.inner_norm)
        named = (*paths, spec.mlp.inner_norm, spec.mlp.input_norm)
        self._norms = {path: block.get_submodule(path) for path in named if path is not None}
        self._scales = [place_of(block, name) for name in (spec.scale_1, spec.scale_2)]
        self._attention = cast("Int8Attention", block.get_submodule(spec.attention.path))

    def run(
        self,
        x: Tensor,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        rope: Any = None,
        first_only: bool = False,
    ) -> Tensor:
        """Tokens [B, L, D] after the block, in the type of x; with first_only the first, [B, 1, D].

        Args:
          x: any float type [B, L, D].
          causal: token i sees tokens 0..i.
          key_mask: which tokens are keys, bool [B, L], or None for all.
          rope: rotary positions as Int8Attention takes them, or None.
          first_only: the other tokens are keys and values to the first and go no further.
        """
        B, L, D = x.shape
        y = self._attend(x, causal, key_mask, rope)
        y, rows = (y[:, 0], x[:, 0]) if first_only else (y.flatten(0, 1), x.reshape(B * L, D))
        attention = self._spec.attention
        out_proj = self._modules[attention.out_proj.path]
        norm, scale = self._spec.norm_1, self._scales[0]
        if attention.inner_norm is None:
            rows = self._add(rows, out_proj.quantize(y), out_proj, norm, scale)
        else:
            # One term of int8 here is half of EVA02-B's error, since the norm has loud channels of
            # its own: 0.049 of the embedding after two blocks, 0.038 with two terms
            both = torch.cat([torch.ones_like(y), y], 1)
            *first, r_q, r_scale = self._gated(both, "none", attention.inner_norm)
            rows = self._add(rows, first, out_proj, norm, scale, (r_q, r_scale, None))
        rows = self._mlp(rows)
        return rows.view(B, 1 if first_only else L, D)

    def _attend(self, x: Tensor, causal: bool, key_mask: Tensor | None, rope: Any) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V: [B, L, D] -> [B, L, H d]."""
        in_proj = self._modules[self._spec.attention.in_proj.path]
        quantized = self._quantize(x.flatten(0, 1), self._before(self._spec.norm_1), in_proj)
        rows = in_proj.multiply(quantized, out_dtype=x.dtype)
        qkv = rows.view(*x.shape[:2], in_proj.out_features)
        return self._attention.attend(qkv, is_causal=causal, key_mask=key_mask, rope=rope)

    def _before(self, norm: Norm) -> str | None:
        """The norm's path, where it stands before its branch."""
        return norm.path if self._spec.order == "pre" else None

    def _mlp(self, rows: Tensor) -> Tensor:
        """rows + the MLP's branch, [M, D]."""
        mlp, norm = self._spec.mlp, self._before(self._spec.norm_2)
        fc1, fc2 = self._modules[mlp.fc1.path], self._modules[mlp.fc2.path]
        x = rows
        if mlp.input_norm is not None and norm is not None:
            x, norm = self._norms[norm](rows), mlp.input_norm
        quantized = self._quantize(x, norm or mlp.input_norm, fc1)
        if not mlp.has_gate:
            activation = cast(Activation, mlp.activation)
            y = fc1.multiply(quantized, activation=activation, out_dtype=rows.dtype)
            quantized = self._quantize(y, mlp.inner_norm, fc2)
            return self._add(rows, quantized, fc2, self._spec.norm_2, self._scales[1])
        y = self._gate_and_up(quantized, fc1, rows.dtype)
        *first, r_q, r_scale = self._gated(y, mlp.activation, mlp.inner_norm)
        scale, second = self._scales[1], (r_q, r_scale, None)
        return self._add(rows, first, fc2, self._spec.norm_2, scale, second)

    def _gate_and_up(self, x: Quantized, fc1: Int8Linear, out_dtype: torch.dtype) -> Tensor:
        """The gate, then what it gates: [M, 2 hidden]."""
        mlp = self._spec.mlp
        y = fc1.multiply(x, out_dtype=out_dtype)
        if mlp.gate is not None:
            gate = self._modules[mlp.gate.path].multiply(x, out_dtype=out_dtype)
            return torch.cat([gate, y], 1)
        return torch.cat(y.chunk(2, 1)[::-1], 1) if mlp.is_gate_last else y

    def _gated(self, x: Tensor, activation: str, path: str | None) -> Any:
        """act(gate) * up, normed where there is a norm of this path, in two terms of int8."""
        gate = operators(self._backend).gated_quantize
        if path is None:
            return gate(x, activation)
        norm = cast(Any, self._norms[path])
        beta = None if getattr(norm, "bias", None) is None else norm.bias.float()
        return gate(x, activation, norm.weight.float(), beta, norm.eps)

    def _quantize(self, x: Tensor, path: str | None, linear: Int8Linear) -> Quantized:
        """Rows [M, K] as the linear reads them, after the norm of this path, if there is one."""
        if path is None:
            return linear.quantize(x)
        norm = self._norms[path]
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return linear.quantize(norm(x))
        gamma, beta = norm.weight.float(), norm.bias.float()
        if linear.is_cut:
            wide = F.layer_norm(x.float(), gamma.shape, gamma, beta, norm.eps)
            return linear.quantize(wide)
        symmetric = linear.granularity == "row_symmetric"
        return operators(self._backend).layer_norm_quantize(  # type: ignore[no-any-return]
            x, gamma, beta, norm.eps, symmetric
        )

    def _add(
        self,
        rows: Tensor,
        x: Any,
        linear: Int8Linear,
        norm: Norm,
        scale: Place | None,
        second: Any = None,
    ) -> Tensor:
        """Rows + scale * linear(x), the norm of the sum, or between them, where it comes after.

        `second` is a second term of x, of which no bias comes.
        """
        gamma = None if scale is None else cast(Tensor, scale[0][scale[1]])
        wide = None if gamma is None else gamma.float()
        order = self._spec.order
        y = linear.multiply(
            x, second=second, residual=None if order == "post" else rows,
            layer_scale=None if order == "post" else wide, out_dtype=rows.dtype,
        )  # fmt: skip
        if order == "pre":
            return y
        y = cast(Tensor, self._norms[norm.path](y))
        if order == "sum":
            return y
        return rows + (y if gamma is None else y * gamma)


def _linear(block: nn.Module, linear: Linear) -> Int8Linear:
    return cast(Int8Linear, block.get_submodule(linear.path))
