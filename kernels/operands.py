"""Operands that belong together, as every function below the schema takes them.

The schemas of torch.ops.lraee.* are flat: tensors and numbers. `from_schema` turns a function of
records into one with the parameters of a schema, `to_schema` the other way round. Both hand
arguments on and check nothing: see lraee.ops.checked. In a FLOP formula each tensor is a shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """LayerNorm, or RMSNorm where beta is None: y = x / sqrt(mean(x^2) + eps) * gamma.

    Args:
      gamma, beta: float32 [D].
      eps: added to the variance, or to the mean square.
    """

    gamma: Tensor
    beta: Tensor | None
    eps: float = 1e-5


class PackedLinear(NamedTuple):
    """y = act(x @ w.T + bias) * layer_scale with an int8 weight of logical shape [N, K].

    Args:
      w: int8, in the layout that the device's implementation reads; see lraee.ops.pack_weight.
      w_scale: float32 [N], real value of one step of w.
      w_sum: int32 [N], from pack_weight.
      bias, layer_scale: float32 [N] or None.
    """

    w: Tensor
    w_scale: Tensor
    w_sum: Tensor
    bias: Tensor | None = None
    layer_scale: Tensor | None = None

    @property
    def N(self) -> int:  # noqa: N802
        """Outputs; K is the width of the input, the layout of w may be padded."""
        return self.w_scale.shape[0]


class AttentionOperands(NamedTuple):
    """What int8_attention is given beside qkv; see there."""

    num_heads: int
    causal: bool = False
    rope: Tensor | None = None
    key_mask: Tensor | None = None


class ProbeHead(NamedTuple):
    """Exit head and gate of one depth.

    Args:
      norm: of the pooled row [P]. P = D: the mean over patch tokens; P = 2 D: and the class token.
      first: [H, P]; [E, P] where second is None.
      second: [E, H] or None.
      classes: float32, bfloat16 or float16 [K, E], K >= 1: rows of length 1, or those less one
        vector common to all, which changes no output.
      logit_scale: factor of the cosine, already exponentiated.
      gate: float32 [4].
    """

    norm: Norm
    first: PackedLinear
    second: PackedLinear | None
    classes: Tensor
    logit_scale: float
    gate: Tensor


class BlockOperands(NamedTuple):
    """One transformer block: x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))).

    Args:
      norm_1, norm_2: of [D].
      in_proj: [D] -> [3 D], queries, keys, values.
      out_proj, c_proj: back to [D]; their layer_scale is ls_1 and ls_2.
      c_fc: [D] -> [hidden], or where gated [D] -> [2 hidden], the gate's rows first; its
        layer_scale is what c_proj wants its input multiplied by.
      symmetric: per linear, in this order, whether its input has no zero point.
      num_heads: H, a divisor of D.
      causal: token i sees tokens 0..i only.
      activation: between c_fc and c_proj, see int8_linear.
      key_mask: bool [B, L] or None, see int8_attention.
      attention: int8_attention, or float_attention on a GPU.
    """

    norm_1: Norm
    in_proj: PackedLinear
    out_proj: PackedLinear
    norm_2: Norm
    c_fc: PackedLinear
    c_proj: PackedLinear
    symmetric: Sequence[bool] = (False,) * 4
    num_heads: int = 1
    causal: bool = False
    activation: str = "gelu"
    key_mask: Tensor | None = None
    attention: Literal["int8", "float"] = "int8"


def _linear_from_schema(function: Callable[..., Any]) -> Callable[..., Any]:
    def int8_linear(
        x_q: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, w_sum: Any, bias: Any = None,
        *, layer_scale: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        linear = PackedLinear(w, w_scale, w_sum, bias, layer_scale)
        return function(x_q, x_scale, x_zero, linear, **options)

    return int8_linear


def _linear_to_schema(operator: Callable[..., Any]) -> Callable[..., Any]:
    def int8_linear(
        x_q: Any, x_scale: Any, x_zero: Any, linear: PackedLinear, **options: Any
    ) -> Any:
        *parts, layer_scale = linear
        return operator(x_q, x_scale, x_zero, *parts, layer_scale=layer_scale, **options)

    return int8_linear


def _norm(vectors: Sequence[Any], eps: float) -> Norm:
    return Norm(vectors[0], vectors[1] if len(vectors) > 1 else None, eps)


def _vectors(norm: Norm) -> list[Tensor]:
    return [norm.gamma] if norm.beta is None else [norm.gamma, norm.beta]


def _block_from_schema(function: Callable[..., Any]) -> Callable[..., Any]:
    def int8_block(
        x: Any, norm_1: Any, in_proj: Any, out_proj: Any, norm_2: Any, c_fc: Any, c_proj: Any,
        eps: Any, symmetric: Any, num_heads: Any, causal: Any, activation: Any,
        first_only: bool = False, key_mask: Any = None, attention: Any = "int8", **options: Any,
    ) -> Any:  # fmt: skip
        block = BlockOperands(
            _norm(norm_1, eps[0]), PackedLinear(*in_proj), PackedLinear(*out_proj),
            _norm(norm_2, eps[1]), PackedLinear(*c_fc), PackedLinear(*c_proj),
            symmetric, num_heads, causal, activation, key_mask, attention,
        )  # fmt: skip
        return function(x, block, first_only, **options)

    return int8_block


def _block_to_schema(operator: Callable[..., Any]) -> Callable[..., Any]:
    def int8_block(x: Any, block: BlockOperands, first_only: bool = False) -> Any:
        norm_1, in_proj, out_proj, norm_2, c_fc, c_proj, *settings = block[:10]
        return operator(
            x, _vectors(norm_1), in_proj, out_proj, _vectors(norm_2), c_fc, c_proj,
            [norm_1.eps, norm_2.eps], *settings, first_only, block.key_mask, block.attention,
        )  # fmt: skip

    return int8_block


def _probe_from_schema(function: Callable[..., Any]) -> Callable[..., Any]:
    def exit_probe(
        z: Any, gamma: Any, beta: Any, eps: Any, w1: Any, w1_scale: Any, w1_sum: Any, b1: Any,
        w2: Any, w2_scale: Any, w2_sum: Any, b2: Any, classes: Any, logit_scale: Any, gate: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        first = PackedLinear(w1, w1_scale, w1_sum, b1)
        second = None if w2 is None else PackedLinear(w2, w2_scale, w2_sum, b2)
        head = ProbeHead(Norm(gamma, beta, eps), first, second, classes, logit_scale, gate)
        return function(z, head, **options)

    return exit_probe


def _probe_to_schema(operator: Callable[..., Any]) -> Callable[..., Any]:
    def exit_probe(z: Any, head: ProbeHead) -> Any:
        norm, first, second, *rest = head
        last = (None,) * 4 if second is None else second[:4]
        return operator(z, *norm, *first[:4], *last, *rest)

    return exit_probe


_FROM_SCHEMA = {
    "int8_linear": _linear_from_schema,
    "int8_block": _block_from_schema,
    "exit_probe": _probe_from_schema,
}
_TO_SCHEMA = {
    "int8_linear": _linear_to_schema,
    "int8_block": _block_to_schema,
    "exit_probe": _probe_to_schema,
}


def from_schema(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of records as one with the parameters of the operator's schema."""
    return _FROM_SCHEMA[name](function) if name in _FROM_SCHEMA else function


def to_schema(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """The inverse of `from_schema`."""
    return _TO_SCHEMA[name](operator) if name in _TO_SCHEMA else operator
