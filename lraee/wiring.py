"""Where the tensors and hooks of an int8 block lie, looked up once instead of at each call."""

from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.linear import Int8Linear, parts_of

A = TypeVar("A", bound=nn.Module)
Linears = tuple[Int8Linear, Int8Linear, Int8Linear, Int8Linear]


class Wiring(Generic[A]):
    """The dicts in which a block and its children keep tensors, children and hooks.

    Looking through the twenty modules of a block takes 28 us, and 72 us where a tower's weights
    have pushed them out of the caches: 6 % of a ViT-B/32 at batch 1 (2 threads of a Zen 4). The
    dicts are a module's own for its life, so a call reads from them what is there now.

    Args:
      block: an Int8Block.
      attn: its attention.
      linears: its four, in_proj, out_proj, c_fc, c_proj.
    """

    def __init__(self, block: nn.Module, attn: A, linears: Linears) -> None:
        """See the class."""
        self.attn = attn
        self._of_block, self._of_attn = block._modules, attn._modules
        self._of_mlp = block.get_submodule("mlp")._modules
        self._children = self._children_now()
        parts = [m for child in block.children() for m in (child, *child.children())]
        self._hooks = [h for m in parts for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._linears = [linear._buffers for linear in linears]
        self._norms = [cast(nn.LayerNorm, block._modules[name]) for name in ("ln_1", "ln_2")]
        self._scales = [block.get_submodule(name)._parameters for name in ("ls_1", "ls_2")]
        self._symmetric = [linear.rounding == "row_symmetric" for linear in linears]

    def _children_now(self) -> list[nn.Module | None]:
        return [*self._of_block.values(), *self._of_attn.values(), *self._of_mlp.values()]

    def is_of(self, block: nn.Module) -> bool:
        """Whether the block still has the children that were looked up."""
        return block._modules is self._of_block and self._children_now() == self._children

    def has_hooks(self) -> bool:
        """Whether a child carries a hook."""
        return any(self._hooks)

    def arguments(self) -> tuple[Any, ...]:
        """norm_1 to eps and symmetric of int8_block, as they are now."""
        norm_1, norm_2 = self._norms
        in_proj, out_proj, c_fc, c_proj = self._linears
        scale_1, scale_2 = self._scales
        return (
            _vectors(norm_1._parameters), parts_of(in_proj), (*parts_of(out_proj), _gamma(scale_1)),
            _vectors(norm_2._parameters), parts_of(c_fc), (*parts_of(c_proj), _gamma(scale_2)),
            (norm_1.eps, norm_2.eps), self._symmetric,
        )  # fmt: skip


def _vectors(parameters: dict[str, nn.Parameter | None]) -> tuple[Tensor, Tensor]:
    """gamma and beta as float32; as they are on a GPU, whose kernels read any float type."""
    gamma, beta = parameters["weight"], parameters["bias"]
    assert gamma is not None and beta is not None  # see Int8Block.can_fuse
    if gamma.is_cuda or (gamma.dtype is torch.float32 and beta.dtype is torch.float32):
        return gamma, beta
    return gamma.float(), beta.float()


def _gamma(parameters: dict[str, nn.Parameter | None]) -> Tensor | None:
    gamma = parameters.get("gamma")
    return gamma if gamma is None or gamma.is_cuda else gamma.float()
