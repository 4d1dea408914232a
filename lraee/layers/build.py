"""Builds the int8 block of a BlockSpec, and the int8 patch embedding."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import RowwiseLinear
from lraee.layers.int8_attention import Int8Attention, Int8MultiheadAttention
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.int8_patch_embedding import Int8PatchEmbedding, require_by_patch
from lraee.layers.modules import Take, carry_hooks, shell, subclass
from lraee.layers.rope import interleaved_to_half
from lraee.layers.scheme import Scheme, channel_copies, quantize_weight
from lraee.layers.spec import Attention, BlockSpec, Linear
from lraee.ops.backend import Backend

Quantize = Callable[[str, Tensor], tuple[Tensor, Tensor]]
"""Name of a linear, such as the block's name and its path in the block, or the path of the patch
embedding, and its float weight [N, K] -> w_q int8 [N, K], w_scale float32 [N]."""


def build_block(
    block: nn.Module,
    spec: BlockSpec,
    name: str,
    *,
    scheme: Scheme,
    backend: Backend,
    take: Take,
    quantize: Quantize | None = None,
) -> Int8Block:
    """The int8 block that stands for a float one; an instance of the float block's class.

    Args:
      block: the float block.
      spec: of this block.
      name: its name in the tower, which the names of its linears begin with.
      scheme: how to quantize.
      backend: which implementation to run on.
      take: brings the parts that stay float (norms, activation, hooks) into the fast model.
      quantize: where the int8 weights come from; None quantizes the float ones by the scheme.
    """
    return _Builder(block, spec, name, scheme, backend, take, quantize).block()


class _Builder:
    """One block on its way; arguments as build_block's."""

    def __init__(
        self,
        block: nn.Module,
        spec: BlockSpec,
        name: str,
        scheme: Scheme,
        backend: Backend,
        take: Take,
        quantize: Quantize | None,
    ) -> None:
        self._float, self._spec, self._name = block, spec, name
        self._scheme, self._backend, self._take = scheme, backend, take
        self._quantize = quantize
        self._linears = {linear.path: linear for linear in spec.linears}

    def block(self) -> Int8Block:
        """The whole."""
        kind = subclass(Int8Block, type(self._float))
        children = {name: self._part(name, m) for name, m in self._float.named_children()}
        result = cast(Int8Block, shell(self._float, kind, children, self._take))
        result.set_up(self._spec, self._backend)
        carry_hooks(self._float, result, self._take)
        return result

    def _part(self, path: str, module: nn.Module) -> nn.Module:
        """What stands for one submodule of the float block."""
        if path == self._spec.attention.path:
            return self._attention()
        if path in self._linears:
            return self._linear(self._linears[path])
        if not any(inner.startswith(f"{path}.") for inner in self._replaced()):
            return self._take(module)
        children = {name: self._part(f"{path}.{name}", m) for name, m in module.named_children()}
        return cast(nn.Module, shell(module, type(module), children, self._take))

    def _replaced(self) -> list[str]:
        return [self._spec.attention.path, *self._linears]

    def _attention(self) -> Int8Attention:
        spec = self._spec.attention
        linears = (spec.in_proj, spec.out_proj) if spec.holds_out_proj else (spec.in_proj,)
        children = {linear.path: self._linear(linear) for linear in linears}
        norms = [path for path in (spec.q_norm, spec.k_norm, spec.inner_norm) if path is not None]
        children |= {path: self._take(self._float.get_submodule(path)) for path in norms}
        kind = Int8MultiheadAttention if spec.call is None else Int8Attention
        return kind(
            self._in_halves(spec) if self._is_reordered else spec,
            {path.removeprefix(f"{spec.path}."): module for path, module in children.items()},
            kind=self._scheme.attention,
            is_sequence_first=self._spec.call.is_sequence_first,
            backend=self._backend,
            has_interleaved_angles=self._is_reordered,
        )

    @property
    def _is_reordered(self) -> bool:
        """Whether rows of queries and keys are put in halves, which int8_attention rotates."""
        spec = self._spec.attention
        is_kept = f"{self._name}.{spec.in_proj.path}" in self._scheme.keep_float
        is_normed = spec.q_norm is not None or spec.k_norm is not None
        is_interleaved = spec.rope is not None and spec.rope.layout == "interleaved"
        return is_interleaved and not is_kept and not is_normed

    @staticmethod
    def _in_halves(spec: Attention) -> Attention:
        assert spec.rope is not None
        return replace(spec, rope=replace(spec.rope, layout="half"))

    def _reordered(self, rows: Tensor | None) -> Tensor | None:
        """Weight or bias of in_proj, each head of queries and keys in halves."""
        if rows is None:
            return None
        q, k, v = rows.detach().chunk(3)
        H = self._spec.attention.num_heads
        return torch.cat([interleaved_to_half(q, H), interleaved_to_half(k, H), v])

    def _linear(self, linear: Linear) -> nn.Module:
        weight, bias = linear.weight(self._float), linear.bias(self._float)
        if linear.path == self._spec.attention.in_proj.path and self._is_reordered:
            weight, bias = cast(Tensor, self._reordered(weight)), self._reordered(bias)
        name = f"{self._name}.{linear.path}"
        if name in self._scheme.keep_float:
            b = None if bias is None else self._take(_parameter(bias))
            return RowwiseLinear.of(self._take(_parameter(weight)), b, self._backend)
        if self._quantize is not None:
            w_q, w_scale = self._quantize(name, weight)
        else:
            w_q, w_scale = quantize_weight(weight, self._scheme, self._backend)
        return Int8Linear(
            w_q, w_scale, bias, dtype=weight.dtype,
            granularity=self._scheme.granularity(linear.site), copies=self._copies(linear),
            has_two_terms=self._has_two_terms(linear),
            rest=self._rest(linear, weight, w_q, w_scale), backend=self._backend,
        )  # fmt: skip

    @property
    def _is_finer(self) -> bool:
        """Whether the block has a gated MLP, whose error is worth more products."""
        is_by_row = self._scheme.activations == "token" and self._scheme.weights == "channel"
        return self._spec.mlp.has_gate and is_by_row

    def _rest(
        self, linear: Linear, weight: Tensor, w_q: Tensor, w_scale: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What int8 leaves of the weights that all tokens meet alike, values and out_proj, in int8:
        half of the error of an EVA02-B's weights.
        """
        attention = self._spec.attention
        if not self._is_finer or linear not in (attention.in_proj, attention.out_proj):
            return None
        first = 2 * len(weight) // 3 if linear is attention.in_proj else 0
        left = weight[first:].detach().float() - w_q[first:] * w_scale[first:, None]
        return quantize_weight(left, self._scheme, self._backend)

    def _copies(self, linear: Linear) -> Tensor | None:
        """Of a linear behind a norm, in a block with a gated MLP: see channel_copies."""
        mlp = self._spec.mlp
        if not self._is_finer:
            return None
        is_pre = self._spec.order == "pre"
        path = None
        if linear is self._spec.attention.in_proj:
            path = self._spec.norm_1.path if is_pre else None
        elif linear is mlp.fc1 or linear is mlp.gate:
            path = mlp.input_norm or (self._spec.norm_2.path if is_pre else None)
        norm = None if path is None else self._float.get_submodule(path)
        gamma = getattr(norm, "weight", None)
        return None if gamma is None else channel_copies(gamma, getattr(norm, "bias", None))

    def _has_two_terms(self, linear: Linear) -> bool:
        """Whether Composed gives this linear its input in two terms."""
        spec = self._spec
        is_behind_norm = linear is spec.attention.out_proj and spec.attention.inner_norm is not None
        is_gated = linear is spec.mlp.fc2 and spec.mlp.has_gate
        return (is_behind_norm or is_gated) and self._scheme.activations == "token"


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The parameter itself, or one of rows that were cut or stacked."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)


def build_patch_embedding(
    embedding: nn.Module,
    name: str,
    *,
    scheme: Scheme,
    backend: Backend,
    take: Take,
    quantize: Quantize | None = None,
) -> Int8Linear:
    """The int8 patch embedding that stands for a Conv2d or Linear; arguments as build_block's.

    Raises: NotImplementedError if it is no linear of each patch.
    """
    require_by_patch(embedding, name)
    weight = cast(nn.Conv2d | nn.Linear, embedding).weight.flatten(1)
    if quantize is None:
        w_q, w_scale = quantize_weight(weight, scheme, backend)
    else:
        w_q, w_scale = quantize(name, weight)
    if isinstance(embedding, nn.Conv2d):
        result: Int8Linear = Int8PatchEmbedding(embedding, name, w_q, w_scale, backend=backend)
    else:
        bias = cast(nn.Linear, embedding).bias
        result = Int8Linear(w_q, w_scale, bias, dtype=weight.dtype, backend=backend)
    carry_hooks(embedding, result.eval(), take)
    return result
