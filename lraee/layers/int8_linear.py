"""A linear layer whose weight is int8."""

from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.kernels.operands import PackedLinear
from lraee.layers.gradients import without_gradient
from lraee.layers.scheme import Granularity, quantize_activation
from lraee.ops.backend import Backend, operators, require_backend
from lraee.ops.checked import Activation
from lraee.ops.reference import Quantized
from lraee.ops.registry import PANEL_N

_WEIGHT_KEY = "w_q"


class Int8Linear(nn.Module):
    """y = x @ w.T + bias with w int8, one scale per output, and x quantized when it arrives.

    The weight lies in the layout that its device's implementation reads (lraee.ops.pack_weight).
    state_dict, pickle and deepcopy carry it as plain int8 [N, K] under the key `w_q`, so that what
    is saved on one machine loads on any other. Scales and bias stay float32 under `.half()` and
    `.bfloat16()`: only `dtype`, the type computed for, follows.
    """

    w: Tensor
    w_scale: Tensor
    w_sum: Tensor
    bias: Tensor | None
    in_scale: Tensor | None
    """float32 [K], what each input channel is multiplied by before it is quantized; None for 1. Set
    by calibration, whose w_q is the weight of the scaled input."""
    copies: Tensor | None
    in_index: Tensor | None
    like: Tensor
    rest: "Int8Linear | None"

    def __init__(
        self,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        granularity: Granularity = "row",
        copies: Tensor | None = None,
        has_two_terms: bool = False,
        rest: "tuple[Tensor, Tensor] | None" = None,
        backend: Backend = "auto",
    ) -> None:
        """Packs a quantized weight.

        Args:
          w_q: int8 [N, K].
          w_scale: float32 [N], real value of one step of w_q.
          bias: any float type [N] or None.
          dtype: the type that `weight` shows; float32, bfloat16 or float16.
          granularity: how the input is quantized, see lraee.layers.scheme.quantize_activation.
          copies: float32 [K], whole numbers, see lraee.layers.scheme.channel_copies: into how many
            equal parts each input channel is cut, every part with its weight; None for one each.
          has_two_terms: `forward` takes its input in two terms of int8, as gated_quantize has them.
          rest: w_q int8 [R, K] and w_scale float32 [R] of a second term of the weight, which is
            added to the first one in the last R rows; None for none.
          backend: which implementation to run on.
        """
        super().__init__()
        self.out_features, self.in_features = w_q.shape
        self.granularity: Granularity = granularity
        self.has_two_terms = has_two_terms
        self.backend: Backend = backend
        in_index = None if copies is None else _index(copies)
        w, w_sum = operators(backend).pack_weight(_columns(w_q, in_index))
        self.register_buffer("w", w, persistent=False)
        self.register_buffer("w_sum", w_sum, persistent=False)
        self.register_buffer("w_scale", w_scale.detach().float())
        # clone: the bias of the float layer must stay its own
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("in_scale", None)
        self.register_buffer("copies", None if copies is None else copies.clone())
        self.register_buffer("in_index", in_index, persistent=False)
        # No elements: it follows .to() and .half(), and so remembers the type computed for
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=w.device), persistent=False)
        self.rest = None
        if rest is not None:
            self.rest = Int8Linear(
                *rest, None, dtype=dtype, granularity=granularity, copies=copies, backend=backend
            )

    def forward(self, x: Tensor) -> Tensor:
        """Any float type [..., K] -> the same type [..., N]."""
        rows = x.reshape(-1, self.in_features)
        if self.has_two_terms:
            y = self._multiply_two_terms(rows)
        else:
            y = self.multiply(self.quantize(rows), out_dtype=x.dtype)
        return without_gradient(y.view(*x.shape[:-1], self.out_features), (x,))

    def quantize(self, x: Tensor) -> Quantized:
        """Rows [M, K] of this layer's input, in int8."""
        if self.in_scale is not None:
            x = x.float() * self.in_scale
        if self.is_cut:
            copies, index = cast(Tensor, self.copies), cast(Tensor, self.in_index)
            x = (x.float() / copies).index_select(1, index)
        return quantize_activation(x, self.granularity, self.backend)

    def _multiply_two_terms(self, x: Tensor) -> Tensor:
        """X @ w.T + bias of rows [M, K] in two terms."""
        both = torch.cat([torch.ones_like(x), x], 1)
        *first, r_q, r_scale = operators(self.backend).gated_quantize(both, "none")
        return self.multiply(cast(Quantized, first), second=(r_q, r_scale, None), out_dtype=x.dtype)

    def multiply(
        self,
        x: Quantized,
        *,
        second: tuple[Tensor, Tensor, None] | None = None,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        activation: Activation = "none",
        out_dtype: torch.dtype,
    ) -> Tensor:
        """act(x @ w.T + bias) * layer_scale + residual: [M, N] from a quantized input [M, K].

        Args:
          x: first term of the input, or all of it.
          second: its second term, or None; there is no activation then, nor with `rest`.
          residual, layer_scale, activation, out_dtype: as int8_linear takes them.
        """
        packed = packed_linear(self._buffers, layer_scale)
        product = operators(self.backend).int8_linear
        if second is not None:
            small = packed._replace(bias=None)
            residual = product(*second, small, residual=residual, out_dtype=out_dtype)
        rest = self.rest
        if rest is not None and rest.out_features == self.out_features:
            small = packed_linear(rest._buffers, layer_scale)
            residual = product(*x, small, residual=residual, out_dtype=out_dtype)
        y: Tensor = product(
            *x, packed, residual=residual, activation=activation, out_dtype=out_dtype
        )
        if rest is not None and rest.out_features < self.out_features:
            y[:, -rest.out_features :] += product(*x, rest.packed, out_dtype=out_dtype)
        return y

    @property
    def packed(self) -> PackedLinear:
        """The operands as operators take them."""
        return packed_linear(self._buffers)  # a module's own look-up takes 1 us for each

    def rows(self, first: int, end: int) -> PackedLinear:
        """Outputs first..end - 1 alone: views, both limits multiples of PANEL_N."""
        w, w_scale, w_sum, bias, _ = self.packed
        panel = PANEL_N if w.dim() == 4 else 1
        b = None if bias is None else bias[first:end]
        views = w[first // panel : end // panel], w_scale[first:end], w_sum[first:end]
        return PackedLinear(*views, b)

    @property
    def is_cut(self) -> bool:
        """Whether any input channel is read in parts."""
        return self.in_index is not None and len(self.in_index) > self.in_features

    @property
    def w_q(self) -> Tensor:
        """The weight as plain int8 [N, K]."""
        unpack = operators(self.backend).unpack_weight
        if self.copies is None or self.in_index is None:
            return cast(Tensor, unpack(self.w, self.out_features, self.in_features))
        w_q = unpack(self.w, self.out_features, len(self.in_index))
        return cast(Tensor, w_q.index_select(1, self._last_parts(self.copies)))

    def joined(self, x: Tensor) -> Tensor:
        """Channels [M, K] of rows of parts, as `quantize` cuts them."""
        if self.copies is None:
            return x
        return x.index_select(1, self._last_parts(self.copies)) * self.copies

    @staticmethod
    def _last_parts(copies: Tensor) -> Tensor:
        return copies.cumsum(0).long() - 1

    @property
    def weight(self) -> Tensor:
        """The weight as numbers [N, K], of type `dtype`; made anew at each call."""
        weight = self.w_q * self.w_scale[:, None]
        if self.rest is not None:
            weight[-self.rest.out_features :] += self.rest.w_q * self.rest.w_scale[:, None]
        if self.in_scale is not None:
            weight *= self.in_scale
        return weight.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type computed for: that of the float model, as `.to` or `.half` changed it."""
        return self.like.dtype

    def extra_repr(self) -> str:
        """What print(model) shows."""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, {self.granularity}"

    # Moving, saving, loading

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Lets .to(device) through, repacking for it; lets no cast reach scales and bias."""
        self.like = fn(self.like)
        if self.like.device != self.w.device:
            require_backend(self.backend, self.like.device)
            w_q = _columns(fn(self.w_q), None if self.in_index is None else fn(self.in_index))
            self.w, self.w_sum = operators(self.backend).pack_weight(w_q)
        else:
            # flat: a channels_last of 4-D tensors is not meant for the packed layout
            self.w = uncast(fn, self.w.view(-1)).view(self.w.shape)
            self.w_sum = uncast(fn, self.w_sum)
        self.w_scale = uncast(fn, self.w_scale)
        self.bias = None if self.bias is None else uncast(fn, self.bias)
        self.in_scale = None if self.in_scale is None else uncast(fn, self.in_scale)
        if self.copies is not None and self.in_index is not None:
            self.copies, self.in_index = uncast(fn, self.copies), uncast(fn, self.in_index)
        if self.rest is not None:
            self.rest._apply(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, _WEIGHT_KEY: self.w_q}
        del buffers["w"], buffers["w_sum"]
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = dict(state["_buffers"])
        w_q = _columns(buffers.pop(_WEIGHT_KEY), buffers["in_index"])
        w, w_sum = operators(state["backend"]).pack_weight(w_q)
        packed = {**state, "_buffers": {"w": w, "w_sum": w_sum, **buffers}}
        super().__setstate__(packed)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _WEIGHT_KEY] = self.w_q

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + _WEIGHT_KEY
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        w_q = state_dict.get(key)
        if w_q is None:
            missing_keys.extend([key] if strict else [])
            return
        shape = (self.out_features, self.in_features)
        if w_q.dtype != torch.int8 or w_q.shape != shape:
            given = f"{w_q.dtype} {list(w_q.shape)}"
            error_msgs.append(f"{key} must be torch.int8 {list(shape)}, got {given}")
            return
        if self.copies is not None:
            self.in_index = _index(self.copies)
        columns = _columns(w_q.to(self.w.device), self.in_index)
        self.w, self.w_sum = operators(self.backend).pack_weight(columns)


def _index(copies: Tensor) -> Tensor:
    """Which channel each part is of, int64."""
    return torch.arange(len(copies), device=copies.device).repeat_interleave(copies.long())


def _columns(w_q: Tensor, index: Tensor | None) -> Tensor:
    """The weight with a column for each part."""
    return w_q if index is None else w_q.index_select(1, index)


def to_other_process(linear: Int8Linear) -> tuple[Any, ...]:
    """How a linear reaches a process that multiprocessing starts.

    A tensor made while pickling would be freed before that process opens its file, so the packed
    weight goes as it lies here; scales and bias go by value, since a process takes no more than
    some 250 open files. A weight on another device is shared as torch shares it.
    """
    state = dict(linear.__dict__)
    buffers = dict(linear._buffers)
    small = {
        name: held.numpy()
        for name, held in buffers.items()
        if name != "w" and held is not None and held.device.type == "cpu" and name != "like"
    }
    state["_buffers"] = {name: held for name, held in buffers.items() if name not in small}
    return _from_other_process, (type(linear), state, small, list(buffers))


def _from_other_process(
    kind: type[Int8Linear], state: dict[str, Any], small: dict[str, Any], order: list[str]
) -> Int8Linear:
    held = {**state["_buffers"], **{name: torch.from_numpy(v) for name, v in small.items()}}
    linear = kind.__new__(kind)
    nn.Module.__setstate__(linear, {**state, "_buffers": {name: held[name] for name in order}})  # type: ignore[no-untyped-call]
    return linear


def packed_linear(
    buffers: Mapping[str, Tensor | None], layer_scale: Tensor | None = None
) -> PackedLinear:
    """The operands among the buffers of an Int8Linear."""
    held = cast(Mapping[str, Tensor], buffers)
    return PackedLinear(held["w"], held["w_scale"], held["w_sum"], held["bias"], layer_scale)


def uncast(fn: Callable[[Tensor], Tensor], constant: Tensor) -> Tensor:
    """fn(constant) if fn moves it; the same numbers if fn casts it."""
    applied = fn(constant)
    return applied if applied.dtype == constant.dtype else constant.to(applied.device)


ForkingPickler.register(Int8Linear, to_other_process)
