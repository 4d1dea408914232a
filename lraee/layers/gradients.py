"""Gradients through int8 layers: there are none, and who asks for one is told so."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import Library, register_fake

NO_GRADIENT = (
    "backward: an accelerated tower has int8 weights and no gradients, got a loss that depends on"
    " its output; call it under torch.no_grad(), or take gradients of the float model"
    " (lraee.restore)"
)

_library = Library("lraee", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("no_gradient(Tensor gradient, SymInt[] shape) -> Tensor")  # type: ignore[no-untyped-call]


def _raise(gradient: Tensor, shape: list[int]) -> Tensor:
    raise RuntimeError(NO_GRADIENT)


_library.impl("no_gradient", _raise, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@register_fake("lraee::no_gradient", lib=_library)  # type: ignore[untyped-decorator]
def _fake(gradient: Tensor, shape: list[int]) -> Tensor:
    return gradient.new_empty(shape)


class _Refusal(torch.autograd.Function):
    """Its output depends on `source` as far as autograd knows; its backward raises.

    By an operator, since torch.compile traces a backward that need never run.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, source: Tensor) -> Tensor:
        ctx.shape = source.shape
        return result.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor]:
        return None, torch.ops.lraee.no_gradient(gradients[0], ctx.shape)


def is_traced() -> bool:
    """Whether torch.jit.trace, or the ONNX export on it, records this call."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call,attr-defined]


def without_gradient(result: Tensor, sources: Iterable[Tensor | None]) -> Tensor:
    """The result; where autograd records and a source needs a gradient, backward() raises.

    Args:
      result: what an operator without a gradient computed.
      sources: all that it was computed from; read only while autograd records.
    """
    if not torch.is_grad_enabled() or is_traced() or torch.compiler.is_exporting():
        return result
    for source in sources:
        if source is not None and source.requires_grad:
            return cast(Tensor, _Refusal.apply(result.detach(), source))
    return result
