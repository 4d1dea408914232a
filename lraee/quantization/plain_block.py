"""Calibration of one plain block: LayerNorm before attention and MLP, nothing else between.

Each linear meets the tokens that the int8 linears before it give, and learns to answer as the float
block does on the float tower's tokens. out_proj and fc2 write into the residual stream, and so make
up for what the stream has lost so far as well.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import Scheme, attention_on
from lraee.layers.spec import BlockSpec, Linear, Norm, tensor_at
from lraee.ops.backend import operators
from lraee.ops.checked import Activation
from lraee.ops.reference import Quantized
from lraee.ops.reference.linear import activate
from lraee.quantization.folding import Fold, search
from lraee.quantization.moments import Moments, Rounded
from lraee.quantization.streams import Streams, numbers

Tensors = dict[str, Tensor]


def is_folded(block: nn.Module, spec: BlockSpec, name: str, scheme: Scheme) -> bool:
    """Whether a block, float or int8, is calibrated here, its norms folded; else by AnyBlock."""
    norms = [block.get_submodule(norm.path) for norm in (spec.norm_1, spec.norm_2)]
    kept = {f"{name}.{linear.path}" for linear in spec.linears} & set(scheme.keep_float)
    width = spec.attention.num_heads * spec.attention.head_dim
    return (
        spec.is_plain
        and not kept
        and all(isinstance(m, nn.LayerNorm) for m in norms)
        and all(m.weight is not None and m.bias is not None for m in norms)
        and all(m.normalized_shape == (width,) for m in norms)
    )


@dataclass(frozen=True)
class _Affine:
    """A LayerNorm in float32, and the type that its parameters have in the model."""

    gamma: Tensor
    beta: Tensor
    eps: float
    dtype: torch.dtype

    @staticmethod
    def of(block: nn.Module, norm: Norm) -> "_Affine":
        module = block.get_submodule(norm.path)
        assert isinstance(module, nn.LayerNorm) and module.bias is not None
        weight, bias = module.weight.detach(), module.bias.detach()
        return _Affine(weight.float().cpu(), bias.float().cpu(), module.eps, weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)

    def folded(self, fold: Fold) -> tuple[Fold, "_Affine"]:
        fold, gamma, beta = fold.into_norm(self.gamma, self.beta, self.dtype)
        return fold, replace(self, gamma=gamma, beta=beta)

    def tensors(self, name: str) -> Tensors:
        return {f"{name}.weight": self.gamma, f"{name}.bias": self.beta}


@dataclass(frozen=True)
class _Product:
    """A float linear: weight [N, K], bias [N] or None, float32."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(block: nn.Module, linear: Linear) -> "_Product":
        weight, bias = linear.weight(block).detach(), linear.bias(block)
        b = None if bias is None else bias.detach().float().cpu()
        return _Product(weight.float().cpu(), b)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def folded(self, fold: Fold) -> "_Product":
        return _Product(fold.weight(self.weight), fold.bias(self.weight, self.bias))

    def with_values_folded(self, fold: Fold) -> "_Product":
        """in_proj whose values come out as (v - shift) / scale."""
        D = len(fold.scale)
        weight = self.weight.clone()
        weight[2 * D :] /= fold.scale[:, None]
        if self.bias is None:
            return _Product(weight, None)
        bias = self.bias.clone()
        bias[2 * D :] = fold.inputs(bias[2 * D :])
        return _Product(weight, bias)


class PlainBlock:
    """One block on its way to int8.

    Args:
      block, spec, name: the float block, its spec, its name in checkpoints.
      scheme: how it is quantized.
      streams: the tokens before it.
    """

    def __init__(
        self, block: nn.Module, spec: BlockSpec, name: str, scheme: Scheme, streams: Streams
    ) -> None:
        self._spec, self._name, self._scheme, self._streams = spec, name, scheme, streams
        linears = (spec.attention.in_proj, spec.attention.out_proj, spec.mlp.fc1, spec.mlp.fc2)
        self._in_proj, self._out_proj, self._fc1, self._fc2 = (
            _Product.of(block, linear) for linear in linears
        )
        self._norm_1, self._norm_2 = (
            _Affine.of(block, norm) for norm in (spec.norm_1, spec.norm_2)
        )
        self._scale_1, self._scale_2 = (
            torch.ones(streams.D) if s is None else tensor_at(block, s).detach().float().cpu()
            for s in (spec.scale_1, spec.scale_2)
        )
        self._in_scale = f"{name}.{spec.mlp.fc2.path}.in_scale"
        self._ops = operators("auto")

    def calibrate(self) -> Tensors:
        """The block's int8 linears and folded norms, by their names in a checkpoint."""
        return self._calibrate_attention() | self._calibrate_mlp()

    def advance(self, tensors: Tensors) -> None:
        """Brings the streams behind the block, for which tensors were calibrated before."""
        for where in self._streams.chunks():
            self._float_attention(where)
            self._float_mlp(where)
        self._int8_to_mid(tensors)
        self._int8_to_end(tensors)

    # Attention

    def _calibrate_attention(self) -> Tensors:
        streams, spec = self._streams, self._spec.attention
        x = self._norm_1(streams.sample(streams.int8))
        y = self._attend(self._in_proj(x)).flatten(0, 1)
        may_shift = self._in_proj.bias is not None and self._out_proj.bias is not None
        values = self._search(y, self._out_proj, spec.out_proj, may_shift=may_shift)
        target = self._in_proj.with_values_folded(values)
        fold = self._search(x.flatten(0, 1), target, spec.in_proj)
        fold, norm = self._norm_1.folded(fold)
        in_proj = target.folded(fold)
        tensors = norm.tensors(f"{self._name}.{self._spec.norm_1.path}")
        sums = self._moments(in_proj)
        for where in streams.chunks():
            picked = streams.picked(where, in_proj.weight.shape[1])
            x_hat = self._normed(streams.int8[where][picked], norm, spec.in_proj)
            sums.add(numbers(x_hat), target(self._norm_1(streams.exact[where][picked])), picked)
        tensors |= self._rounded(sums, in_proj, spec.in_proj)
        out_proj = self._out_proj.folded(values)
        sums = self._moments(out_proj)
        for where in streams.chunks():
            picked = streams.picked(where, out_proj.weight.shape[1])
            y = self._int8_attention(where, tensors)
            branch = self._float_attention(where)
            lost = (streams.exact[where] - streams.int8[where])[picked]
            x_hat = self._requantized(y[picked], spec.out_proj)
            sums.add(numbers(x_hat), branch[picked] + _over(lost, self._scale_1), picked)
        tensors |= self._rounded(sums, out_proj, spec.out_proj, self._scale_1)
        self._int8_to_mid(tensors)
        return tensors

    def _float_attention(self, where: slice) -> Tensor:
        """out_proj's outputs [B, L, D] in float; the float stream goes on behind them."""
        z = self._streams.exact[where]
        branch = self._out_proj(self._attend(self._in_proj(self._norm_1(z))))
        self._streams.exact_mid[where] = z + branch * self._scale_1
        return branch

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention in float: [B, L, 3 D] -> [B, L, D]."""
        B, L, width = qkv.shape
        heads = qkv.view(B, L, 3, self._spec.attention.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self._spec.attention.is_causal)
        return y.transpose(1, 2).reshape(B, L, width // 3)

    def _int8_attention(self, where: slice, tensors: Tensors) -> Tensor:
        """What out_proj meets in the int8 block, [B, L, D]."""
        spec, z = self._spec.attention, self._streams.int8[where]
        norm = self._stored(self._norm_1, self._spec.norm_1, tensors)
        in_proj = self._linear(spec.in_proj, tensors)
        x = self._normed(z.flatten(0, 1), norm, spec.in_proj)
        qkv = in_proj.multiply(x, out_dtype=torch.float32).view(*z.shape[:2], -1)
        if attention_on(self._scheme.attention, z.device) == "float":
            return self._attend(qkv)
        y: Tensor = self._ops.int8_attention(qkv, num_heads=spec.num_heads, causal=spec.is_causal)
        return y

    def _int8_to_mid(self, tensors: Tensors) -> None:
        streams, spec = self._streams, self._spec.attention
        out_proj = self._linear(spec.out_proj, tensors)
        for where in streams.chunks():
            y = self._requantized(self._int8_attention(where, tensors).flatten(0, 1), spec.out_proj)
            z = out_proj.multiply(
                y, residual=streams.int8[where].flatten(0, 1), layer_scale=self._scale_1,
                out_dtype=torch.float32,
            )  # fmt: skip
            streams.int8_mid[where] = z.view_as(streams.int8[where])

    # MLP

    def _calibrate_mlp(self) -> Tensors:
        streams, spec = self._streams, self._spec.mlp
        x = self._norm_2(streams.sample(streams.int8_mid)).flatten(0, 1)
        fold, norm = self._norm_2.folded(self._search(x, self._fc1, spec.fc1))
        fc1 = self._fc1.folded(fold)
        tensors = norm.tensors(f"{self._name}.{self._spec.norm_2.path}")
        sums = self._moments(fc1)
        for where in streams.chunks():
            picked = streams.picked(where, fc1.weight.shape[1])
            x_hat = self._normed(streams.int8_mid[where][picked], norm, spec.fc1)
            sums.add(
                numbers(x_hat), self._fc1(self._norm_2(streams.exact_mid[where][picked])), picked
            )
        tensors |= self._rounded(sums, fc1, spec.fc1)
        rows = streams.sample(streams.int8_mid).flatten(0, 1)
        fold = self._search(self._hidden(rows, tensors), self._fc2, spec.fc2, may_shift=False)
        tensors[self._in_scale] = 1 / fold.scale
        fc2 = self._fc2.folded(fold)
        sums = self._moments(fc2)
        for where in streams.chunks():
            picked = streams.picked(where, fc2.weight.shape[1])
            x_hat = self._int8_hidden(streams.int8_mid[where][picked], tensors)
            branch = self._float_mlp(where)
            lost = (streams.exact_mid[where] - streams.int8_mid[where])[picked]
            sums.add(numbers(x_hat), branch[picked] + _over(lost, self._scale_2), picked)
        tensors |= self._rounded(sums, fc2, spec.fc2, self._scale_2)
        self._int8_to_end(tensors)
        return tensors

    def _float_mlp(self, where: slice) -> Tensor:
        """fc2's outputs [B, L, D] in float; the float stream goes on behind them."""
        z = self._streams.exact_mid[where]
        hidden = activate(self._fc1(self._norm_2(z)), self._spec.mlp.activation)
        branch = self._fc2(hidden)
        self._streams.exact[where] = z + branch * self._scale_2
        return branch

    def _int8_hidden(self, rows: Tensor, tensors: Tensors) -> Quantized:
        """What fc2 meets in the int8 block, of rows [M, D] before the MLP."""
        return self._requantized(self._hidden(rows, tensors), self._spec.mlp.fc2)

    def _hidden(self, rows: Tensor, tensors: Tensors) -> Tensor:
        """act(fc1(norm_2(rows))) of the int8 block, scaled as fc2 reads it: [M, hidden]."""
        spec = self._spec.mlp
        norm = self._stored(self._norm_2, self._spec.norm_2, tensors)
        x = self._normed(rows, norm, spec.fc1)
        activation = cast(Activation, spec.activation)
        fc1 = self._linear(spec.fc1, tensors)
        return fc1.multiply(
            x, activation=activation, layer_scale=tensors.get(self._in_scale),
            out_dtype=torch.float32,
        )  # fmt: skip

    def _int8_to_end(self, tensors: Tensors) -> None:
        streams = self._streams
        fc2 = self._linear(self._spec.mlp.fc2, tensors)
        for where in streams.chunks():
            rows = streams.int8_mid[where].flatten(0, 1)
            z = fc2.multiply(
                self._int8_hidden(rows, tensors), residual=rows, layer_scale=self._scale_2,
                out_dtype=torch.float32,
            )  # fmt: skip
            streams.int8[where] = z.view_as(streams.int8[where])

    # Steps

    def _search(
        self, rows: Tensor, product: _Product, linear: Linear, may_shift: bool | None = None
    ) -> Fold:
        may_shift = product.bias is not None if may_shift is None else may_shift
        granularity = self._scheme.granularity(linear.site)
        return search(rows, product.weight, granularity, may_shift=may_shift)

    def _moments(self, product: _Product) -> Moments:
        N, K = product.weight.shape
        return Moments(K, N, has_target=True, has_class=self._streams.has_class)

    def _rounded(
        self, sums: Moments, product: _Product, linear: Linear, importance: Tensor | None = None
    ) -> Tensors:
        rounded: Rounded = sums.result(product.weight, product.bias, importance)
        return rounded.tensors(f"{self._name}.{linear.path}")

    def _linear(self, linear: Linear, tensors: Tensors) -> Int8Linear:
        name = f"{self._name}.{linear.path}"
        return Int8Linear(
            tensors[f"{name}.w_q"], tensors[f"{name}.w_scale"], tensors.get(f"{name}.bias"),
            granularity=self._scheme.granularity(linear.site),
        )  # fmt: skip

    def _stored(self, norm: _Affine, spec: Norm, tensors: Tensors) -> _Affine:
        name = f"{self._name}.{spec.path}"
        return replace(norm, gamma=tensors[f"{name}.weight"], beta=tensors[f"{name}.bias"])

    def _normed(self, rows: Tensor, norm: _Affine, linear: Linear) -> Quantized:
        """Rows [M, D] of the stream as the linear reads them."""
        is_symmetric = self._scheme.granularity(linear.site) == "row_symmetric"
        x: Quantized = self._ops.layer_norm_quantize(
            rows.contiguous(), norm.gamma, norm.beta, norm.eps, is_symmetric
        )
        return x

    def _requantized(self, rows: Tensor, linear: Linear) -> Quantized:
        is_symmetric = self._scheme.granularity(linear.site) == "row_symmetric"
        x: Quantized = self._ops.quantize_rows(rows.contiguous(), is_symmetric)
        return x


def _over(lost: Tensor, scale: Tensor) -> Tensor:
    """lost / scale; 0 where a layer scale is 0, which nothing gets through."""
    return torch.where(scale == 0, 0.0, lost / torch.where(scale == 0, 1.0, scale))
