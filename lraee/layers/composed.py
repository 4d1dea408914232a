"""A block that is more than the operator int8_block computes: its operators, one after the other.

Rotary positions, norms inside attention and MLP, gated MLPs, RMSNorm and norms after the branches.
Every step works row by row, so an image has the same bits in any batch. Activations are computed in
the epilogue of int8_linear: torch's own end a thread's share of a tensor with scalar code, whose
bits are others.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lraee.kernels.operands import PackedLinear
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.spec import ACTIVATIONS, Linear, Norm
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

    def run(self, x: Tensor, *, causal: bool, rope: Any = None, first_only: bool = False) -> Tensor:
        """Tokens [B, L, D] after the block, in the type of x; with first_only the first, [B, 1, D].

        Args:
          x: any float type [B, L, D].
          causal: token i sees tokens 0..i.
          rope: rotary positions as Int8Attention takes them, or None.
          first_only: the other tokens are keys and values to the first and go no further.
        """
        B, L, D = x.shape
        y = self._attend(x, causal, rope)
        y, rows = (y[:, 0], x[:, 0]) if first_only else (y.flatten(0, 1), x.reshape(B * L, D))
        attention, mlp = self._spec.attention, self._spec.mlp
        out_proj = self._modules[attention.out_proj.path]
        quantized = self._quantize(y, attention.inner_norm, out_proj)
        rows = self._add(rows, quantized, out_proj, self._spec.norm_1, self._scales[0])
        fc2 = self._modules[mlp.fc2.path]
        quantized = self._quantize(self._hidden(rows), mlp.inner_norm, fc2)
        rows = self._add(rows, quantized, fc2, self._spec.norm_2, self._scales[1])
        return rows.view(B, 1 if first_only else L, D)

    def _attend(self, x: Tensor, causal: bool, rope: Any) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V: [B, L, D] -> [B, L, H d]."""
        in_proj = self._modules[self._spec.attention.in_proj.path]
        quantized = self._quantize(x.flatten(0, 1), self._before(self._spec.norm_1), in_proj)
        rows = in_proj.multiply(quantized, out_dtype=x.dtype)
        qkv = rows.view(*x.shape[:2], in_proj.out_features)
        return self._attention.attend(self._attention.placed(qkv, rope), is_causal=causal)

    def _before(self, norm: Norm) -> str | None:
        """The norm's path, where it stands before its branch."""
        return norm.path if self._spec.order == "pre" else None

    def _hidden(self, rows: Tensor) -> Tensor:
        """What fc2, or the norm before it, reads: [M, D] -> [M, hidden]."""
        mlp, norm = self._spec.mlp, self._before(self._spec.norm_2)
        fc1 = self._modules[mlp.fc1.path]
        if mlp.input_norm is not None and norm is not None:
            rows, norm = self._norms[norm](rows), mlp.input_norm
        quantized = self._quantize(rows, norm or mlp.input_norm, fc1)
        if mlp.gate is not None:
            gate = self._modules[mlp.gate.path].packed
            return self._gated(quantized, gate, fc1.packed, rows.dtype)
        if mlp.is_gated:
            half = fc1.out_features // 2
            first, second = fc1.rows(0, half), fc1.rows(half, 2 * half)
            gate, up = (second, first) if mlp.is_gate_last else (first, second)
            return self._gated(quantized, gate, up, rows.dtype)
        activation = cast(Activation, mlp.activation)
        return fc1.multiply(quantized, activation=activation, out_dtype=rows.dtype)

    def _gated(
        self, x: Quantized, gate: PackedLinear, up: PackedLinear, out_dtype: torch.dtype
    ) -> Tensor:
        """act(gate(x)) * up(x)."""
        multiply, activation = operators(self._backend).int8_linear, self._spec.mlp.activation
        if activation not in ACTIVATIONS:
            gate, activation = _silu_by_quick_gelu(gate), "quick_gelu"
        g = multiply(*x, gate, activation=activation, out_dtype=torch.float32)
        u = multiply(*x, up, out_dtype=torch.float32)
        return cast(Tensor, g.mul_(u).to(out_dtype))

    def _quantize(self, x: Tensor, path: str | None, linear: Int8Linear) -> Quantized:
        """Rows [M, K] as the linear reads them, after the norm of this path, if there is one."""
        if path is None:
            return linear.quantize(x)
        norm = self._norms[path]
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return linear.quantize(norm(x))
        gamma, beta = norm.weight.float(), norm.bias.float()
        symmetric = linear.rounding == "row_symmetric"
        return operators(self._backend).layer_norm_quantize(  # type: ignore[no-any-return]
            x, gamma, beta, norm.eps, symmetric
        )

    def _add(
        self, rows: Tensor, x: Quantized, linear: Int8Linear, norm: Norm, scale: Place | None
    ) -> Tensor:
        """Rows + scale * linear(x), the norm between them where it comes after."""
        gamma = None if scale is None else cast(Tensor, scale[0][scale[1]])
        if self._spec.order == "pre":
            wide = None if gamma is None else gamma.float()
            return linear.multiply(x, residual=rows, layer_scale=wide, out_dtype=rows.dtype)
        y = self._norms[norm.path](linear.multiply(x, out_dtype=rows.dtype))
        return rows + cast(Tensor, y if gamma is None else y * gamma)


def _linear(block: nn.Module, linear: Linear) -> Int8Linear:
    return cast(Int8Linear, block.get_submodule(linear.path))


def _silu_by_quick_gelu(linear: PackedLinear) -> PackedLinear:
    """silu(x) = 1.702 quick_gelu(x / 1.702), quick_gelu an activation of int8_linear."""
    bias = None if linear.bias is None else linear.bias / 1.702
    scale = torch.full_like(linear.w_scale, 1.702)
    return linear._replace(w_scale=linear.w_scale / 1.702, bias=bias, layer_scale=scale)
