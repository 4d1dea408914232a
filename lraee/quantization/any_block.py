"""Calibration of a block of any structure: each weight rounded against the inputs that it meets.

The block's own code runs over its int8 linears, and a hook on each sees its input. Norms stay as
they are: what stands before these linears (rotary positions, gates, norms behind branches) differs
by family, and takes no scale without changing the float function.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.layers.build import build_block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.modules import Take
from lraee.layers.scheme import Scheme, quantize_weight
from lraee.layers.spec import BlockSpec, Linear
from lraee.quantization.moments import Moments
from lraee.quantization.streams import Streams, numbers
from lraee.towers.families import as_input, blocks_of
from lraee.towers.runner import RowwiseTower

Tensors = dict[str, Tensor]


class AnyBlock:
    """One block on its way to int8.

    Args:
      block, spec, name: the float block, its spec, its name in checkpoints.
      scheme: how it is quantized.
      streams: the int8 stream before it.
      fast: the accelerated tower, its earlier blocks calibrated; this block's linears change.
      i: which block it is.
    """

    def __init__(
        self,
        block: nn.Module,
        spec: BlockSpec,
        name: str,
        scheme: Scheme,
        streams: Streams,
        *,
        fast: nn.Module,
        i: int,
    ) -> None:
        self._spec, self._name, self._streams, self._i = spec, name, streams, i
        self._fast, self._block = cast(RowwiseTower, fast), blocks_of(fast)[i]
        self._is_last = i == len(blocks_of(fast)) - 1
        self._weights = _weights(block, spec, name, scheme)

    def calibrate(self) -> Tensors:
        """The block's int8 linears, by their names in a checkpoint."""
        tensors: Tensors = {}
        for linear in self._spec.linears:
            module = self._block.get_submodule(linear.path)
            if isinstance(module, Int8Linear):
                tensors |= self._round(module, linear)
        self._to_end()
        return tensors

    def advance(self, tensors: Tensors) -> None:
        """Brings the stream behind the block, for which tensors were calibrated before."""
        for linear in self._spec.linears:
            module = self._block.get_submodule(linear.path)
            if isinstance(module, Int8Linear):
                put_linear(module, tensors, f"{self._name}.{linear.path}")
        self._to_end()

    def _round(self, module: Int8Linear, linear: Linear) -> Tensors:
        name = f"{self._name}.{linear.path}"
        weight = self._weights[name].detach().float().cpu()
        N, K = weight.shape
        sums = Moments(K, N, has_target=False, has_class=self._streams.has_class)
        is_exact = module.has_two_terms
        where = slice(0, 0)

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, K)
            picked = self._streams.picked(where, K)
            if len(x) == picked.numel():
                x = x[picked.flatten().to(x.device)]
            else:
                picked = torch.ones(len(picked), len(x) // len(picked), dtype=torch.bool)
            x_hat = x.float() if is_exact else module.joined(numbers(module.quantize(x)))
            sums.add(x_hat.cpu(), None, picked)

        handle = module.register_forward_pre_hook(see)
        try:
            for where in self._streams.chunks():
                self._run(where)
        finally:
            handle.remove()
        bias = None if module.bias is None else module.bias.float().cpu()
        tensors = _with_kept(sums.result(weight, bias).tensors(name), module, name)
        put_linear(module, tensors, name)
        return tensors

    def _run(self, where: slice) -> Tensor:
        z = as_input(self._fast, self._streams.int8[where])
        return self._fast.run_blocks(z, self._i, self._i + 1)

    def _to_end(self) -> None:
        if self._is_last:  # of which the tower may keep the class token alone
            return
        for where in self._streams.chunks():
            self._streams.int8[where] = self._run(where).float().cpu()


def _with_kept(tensors: Tensors, module: Int8Linear, name: str) -> Tensors:
    """The tensors, but for rows whose weight has a second term: these are near enough as they
    are, and the second term is that of these very numbers.
    """
    if module.rest is None:
        return tensors
    R = module.rest.out_features
    for own, tensor in tensors.items():
        before: Tensor = getattr(module, own.removeprefix(f"{name}."))
        tensor[-R:] = before[-R:].to(tensor)
    return tensors


def put_linear(module: Int8Linear, tensors: Tensors, name: str) -> None:
    """Gives an int8 linear the calibrated numbers of this name."""
    own = {"w_q": tensors[f"{name}.w_q"], "w_scale": tensors[f"{name}.w_scale"]}
    if module.bias is not None:
        own["bias"] = tensors[f"{name}.bias"]
    if f"{name}.in_scale" in tensors:
        own["in_scale"] = module.in_scale = tensors[f"{name}.in_scale"].to(module.w.device)
    if module.copies is not None:
        own["copies"] = module.copies
    if module.rest is not None:
        own |= {f"rest.{key}": tensor for key, tensor in module.rest.state_dict().items()}
    module.load_state_dict(own)


def _weights(block: nn.Module, spec: BlockSpec, name: str, scheme: Scheme) -> Tensors:
    """The float weights [N, K], rows in the order of the int8 linears'."""
    weights: Tensors = {}

    def note(linear: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        weights[linear] = weight
        return quantize_weight(weight, scheme, "reference")

    build_block(
        block, spec, name, scheme=scheme, backend="auto", take=cast(Take, _as_is), quantize=note
    )
    return weights


def _as_is(part: Any) -> Any:
    return part
