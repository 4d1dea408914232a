"""Int8Block: what stands in a tower where the float block stood."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lraee.kernels.operands import BlockOperands, Norm
from lraee.layers.composed import Composed
from lraee.layers.gradients import without_gradient
from lraee.layers.int8_attention import Int8Attention, is_causal, require_no_rope
from lraee.layers.int8_linear import Int8Linear, packed_linear
from lraee.layers.modules import Adapter, is_hooked, library_class
from lraee.layers.padding import by_valid_tokens, split_mask
from lraee.layers.spec import BlockSpec
from lraee.layers.watch import Place, Watch, place_of
from lraee.ops.backend import Backend, operators

TRAIN_REFUSED = (
    "train: an accelerated tower has int8 weights and no gradients; train the float model"
    " (lraee.restore), then accelerate it"
)


class Int8Block(Adapter):
    """A transformer block in int8: a subclass of the float block's class (see `build_block`).

    Children have the names of the float block's, and each is a real module. As a rule the block
    calls none of them: it runs the operator int8_block, or, where its structure is more than that
    operator computes, the smaller operators one after the other (see `Composed`). It runs the float
    class's own forward over the int8 children where a child carries a hook, so that the hook sees
    what it would have seen, and where the scheme cannot be fused (a linear kept float, one scale
    per batch). All ways agree within rounding: fused, LayerNorm reaches its quantizer, and each sum
    its activation or residual, in float32 instead of x's type.
    """

    block_spec: BlockSpec
    int8_backend: Backend
    can_fuse: bool
    _wiring: "Wiring | Composed | None"

    def set_up(self, spec: BlockSpec, backend: Backend) -> None:
        """To be called once, when all children are in place."""
        self.block_spec = spec
        self.int8_backend = backend
        self.can_fuse = self._can_fuse()
        self._wiring = None
        nn.Module.train(self, False)

    def forward(self, *args: Any, **named: Any) -> Any:
        """Tokens of any float type -> the same, as `block_spec.call` says.

        The mask is None, causal, or one of keys: see lraee.layers.padding.
        """
        call = self.block_spec.call
        x, mask, rope = call.read("Int8Block", args, named)
        result = self._forward(x, mask, rope, args, named)
        if isinstance(result, tuple):
            return (without_gradient(result[0], (x,)), *result[1:])
        return without_gradient(result, (x,))

    def _forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rope: Any,
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        call = self.block_spec.call
        wiring = self._wired() if self.can_fuse else None
        if wiring is None or wiring.has_hooks():
            return self._forward_by_child(x, mask, args, named)
        tokens, attention = call.by_image(x), self.block_spec.attention
        B, L, _ = tokens.shape
        mask, valid = split_mask(mask, B, L, "Int8Block", attention.is_causal)
        causal = attention.is_causal or is_causal(mask, L)
        if valid is not None and not attention.masks_keys:
            require_no_rope(rope, "Int8Block")
            run = partial(wiring.run, causal=causal)
            return call.wrap(call.by_image(by_valid_tokens(tokens, valid, run, tokens)))
        y = wiring.run(tokens, causal=causal, key_mask=valid, rope=rope)
        return call.wrap(call.by_image(y))

    def gives_first_alone(self) -> bool:
        """Whether `first_token` may stand for a call: fused, and no hook would see the call."""
        return self.can_fuse and not is_hooked(self) and not self._wired().has_hooks()

    def first_token(self, x: Tensor, rope: Any = None) -> Tensor:
        """Of [B, L, D], in whichever order the tower calls it, the first token after: [B, 1, D].

        The bits of forward(x)[:, :1]. The other tokens stay keys and values: three quarters of the
        block's products are not made. Needs `gives_first_alone`.

        Args:
          x: tokens [B, L, D].
          rope: rotary positions, where the tower calls the block with them.
        """
        causal = self.block_spec.attention.is_causal
        return self._wired().run(x, causal=causal, rope=rope, first_only=True)

    def train(self, mode: bool = True) -> "Int8Block":
        """Raises: an int8 block has no gradients."""
        if mode:
            raise RuntimeError(TRAIN_REFUSED)
        return nn.Module.train(self, False)

    def get_weight_dtype(self) -> torch.dtype:
        """The type computed for; open_clip asks each block."""
        fc1 = self.get_submodule(self.block_spec.mlp.fc1.path)
        return fc1.dtype if isinstance(fc1, Int8Linear) else cast(nn.Linear, fc1).weight.dtype

    def __getstate__(self) -> dict[str, Any]:
        """All but what is found again in the copy."""
        return {**self.__dict__, "_wiring": None}

    def _wired(self) -> "Wiring | Composed":
        wiring = self._wiring
        if wiring is None or not wiring.is_of(self):
            wiring = self._wiring = Wiring(self) if self._is_one_operator() else Composed(self)
        return wiring

    def _forward_by_child(
        self, x: Tensor, mask: Tensor | None, args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """The float class's forward: the attention and the linears in it are int8."""
        call = self.block_spec.call
        # libraries add a mask of two dimensions to the scores
        if mask is not None and mask.dtype == torch.bool and mask.dim() == 2:
            L = call.by_image(x).shape[1]
            hidden = torch.zeros(mask.shape, dtype=x.dtype, device=mask.device)
            named = {**dict(zip(call.parameters, args, strict=False)), **named}
            is_causal(mask, L)
            named[cast(str, call.mask)] = hidden.masked_fill(mask, -torch.inf)
            args = ()
        return super().forward(*args, **named, **self._missing(args, named))

    def _missing(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, None]:
        """Arguments that the float class requires and the call leaves out."""
        parameters = inspect.signature(library_class(self).forward).parameters
        names = self.block_spec.call.parameters[max(1, len(args)) :]
        required = (n for n in names if n in parameters and parameters[n].default is inspect._empty)
        return {name: None for name in required if name not in named}

    @property
    def attention_module(self) -> Int8Attention:
        """The attention of this block."""
        return cast(Int8Attention, self.get_submodule(self.block_spec.attention.path))

    @property
    def is_by_row(self) -> bool:
        """Whether each image has the same bits in any batch: no scale is the batch's."""
        linears = [self.get_submodule(linear.path) for linear in self.block_spec.linears]
        return self.attention_module.kind != "float" and all(
            isinstance(m, Int8Linear) and m.granularity.startswith("row") for m in linears
        )

    def _can_fuse(self) -> bool:
        """Whether all steps are operators that work row by row."""
        return self.is_by_row

    def _is_one_operator(self) -> bool:
        """Whether the operator int8_block computes it."""
        spec = self.block_spec
        norms = [self.get_submodule(norm.path) for norm in (spec.norm_1, spec.norm_2)]
        in_proj = cast(Int8Linear, self.get_submodule(spec.attention.in_proj.path))
        return (
            spec.is_plain
            and all(isinstance(m, nn.LayerNorm) for m in norms)
            and all(m.weight is not None and m.bias is not None for m in norms)
            and spec.attention.num_heads * spec.attention.head_dim == in_proj.in_features
        )


class Wiring(Watch):
    """The operands of the operator int8_block, as the children of one block hold them.

    Args:
      block: one that can_fuse and is one operator.
    """

    def __init__(self, block: Int8Block) -> None:
        """See the class."""
        super().__init__(block)
        spec = block.block_spec
        linears = [cast(Int8Linear, block.get_submodule(linear.path)) for linear in spec.linears]
        self._linears = [linear._buffers for linear in linears]
        paths = (spec.norm_1.path, spec.norm_2.path)
        self._norms = [cast(nn.LayerNorm, block.get_submodule(path)) for path in paths]
        self._scales = [place_of(block, name) for name in (spec.scale_1, spec.scale_2)]
        self._symmetric = [linear.granularity == "row_symmetric" for linear in linears]
        self._num_heads, self._activation = spec.attention.num_heads, spec.mlp.activation
        self._attention = block.attention_module
        self._backend = block.int8_backend

    def run(
        self,
        x: Tensor,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        rope: Any = None,
        first_only: bool = False,
    ) -> Tensor:
        """Tokens [B, L, D] after the block; with first_only the first, [B, 1, D]."""
        block = self._operands(causal, key_mask, self._attention.kind_on(x.device))
        return operators(self._backend).int8_block(x, block, first_only)  # type: ignore[no-any-return]

    def _operands(
        self, causal: bool, key_mask: Tensor | None, attention: Literal["int8", "float"]
    ) -> BlockOperands:
        """Those of int8_block, as they are now."""
        norm_1, norm_2 = self._norms
        in_proj, out_proj, fc1, fc2 = self._linears
        scale_1, scale_2 = self._scales
        return BlockOperands(
            _norm(norm_1), packed_linear(in_proj), packed_linear(out_proj, _gamma(scale_1)),
            _norm(norm_2), packed_linear(fc1, fc2["in_scale"]), packed_linear(fc2, _gamma(scale_2)),
            self._symmetric, self._num_heads, causal, self._activation, key_mask, attention,
        )  # fmt: skip


def _norm(norm: nn.LayerNorm) -> Norm:
    """gamma and beta as float32; as they are on a GPU, whose kernels read any float type."""
    gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
    assert gamma is not None and beta is not None  # see Int8Block.can_fuse
    if gamma.is_cuda or (gamma.dtype is torch.float32 and beta.dtype is torch.float32):
        return Norm(gamma, beta, norm.eps)
    return Norm(gamma.float(), beta.float(), norm.eps)


def _gamma(place: Place | None) -> Tensor | None:
    if place is None:
        return None
    gamma = place[0].get(place[1])
    return gamma if gamma is None or gamma.is_cuda else gamma.float()
