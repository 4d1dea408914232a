"""Int8Attention and Int8Block: what stands in a tower where the float block stood."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.kernels.operands import BlockOperands, Norm
from lraee.layers.int8_linear import Int8Linear, packed_linear
from lraee.ops.backend import Backend, operators
from lraee.ops.checked import Activation


class Int8Attention(nn.Module):
    """Self-attention with int8 projections, called as open_clip calls its own `Attention`.

    Args:
      in_proj: [D] -> [3 D], queries, keys, values.
      out_proj: [D] -> [D].
      num_heads: H, a divisor of D.
      is_int8: Q K^T in int8; else all of attention in float.
      batch_first: x is [B, L, D]; else [L, B, D].
      backend: which implementation of int8_attention to run on.
    """

    def __init__(
        self,
        in_proj: nn.Module,
        out_proj: nn.Module,
        *,
        num_heads: int,
        is_int8: bool = True,
        batch_first: bool = True,
        backend: Backend = "auto",
    ) -> None:
        """See the class."""
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.is_int8 = is_int8
        self.batch_first = batch_first
        self.backend: Backend = backend

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Any float type [B, L, D] (or [L, B, D]) -> the same; attn_mask None or causal."""
        qkv = self.in_proj(x)
        qkv = qkv if self.batch_first else qkv.transpose(0, 1)
        y = self.attend(qkv, is_causal=is_causal(attn_mask, qkv.shape[1]))
        return cast(Tensor, self.out_proj(y if self.batch_first else y.transpose(0, 1)))

    def attend(self, qkv: Tensor, *, is_causal: bool) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V: [B, L, 3 D] -> [B, L, D]."""
        if self.is_int8:
            return operators(self.backend).int8_attention(  # type: ignore[no-any-return]
                qkv, num_heads=self.num_heads, causal=is_causal
            )
        B, L, D3 = qkv.shape
        heads = qkv.view(B, L, 3, self.num_heads, D3 // (3 * self.num_heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return y.transpose(1, 2).reshape(B, L, D3 // 3)


class Int8MultiheadAttention(Int8Attention):
    """The same, called as torch's nn.MultiheadAttention is: self-attention without weights."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(y, None): the attention weights are not kept."""
        others = [t for t in (key, value) if t is not None and t is not query]
        if others or key_padding_mask is not None or need_weights:
            raise NotImplementedError(
                "Int8MultiheadAttention: only self-attention without padding mask and without"
                " need_weights runs in int8; use the float model (lraee.restore) for these"
            )
        return super().forward(query, attn_mask), None


class Int8Block(nn.Module):
    """One transformer block: x + ls_1(attn(ln_1(x))), then x + ls_2(mlp(ln_2(x))).

    Child names are those of the float block, and each child is a real module. As a rule the block
    calls none of them: it runs the operator int8_block. It runs child by child where a child
    carries a hook, so that the hook sees what it would have seen, and where the scheme cannot be
    fused (a linear kept float, one step per batch). Both ways agree within rounding: fused,
    LayerNorm reaches its quantizer, and each sum its activation or residual, in float32 instead of
    x's type.

    Args:
      ln_1, attn, ls_1, ln_2, mlp, ls_2: the children; ls_* Identity or with a vector `gamma`; mlp
        with children c_fc, gelu, c_proj.
      ln_attn: an Identity that some blocks have after attn, or None.
      activation: what mlp.gelu computes.
    """

    def __init__(
        self,
        *,
        ln_1: nn.LayerNorm,
        attn: Int8Attention,
        ls_1: nn.Module,
        ln_2: nn.LayerNorm,
        mlp: nn.Sequential,
        ls_2: nn.Module,
        ln_attn: nn.Module | None,
        activation: Activation,
    ) -> None:
        """See the class."""
        super().__init__()
        self.ln_1 = ln_1
        self.attn = attn
        if ln_attn is not None:
            self.ln_attn = ln_attn
        self.ls_1 = ls_1
        self.ln_2 = ln_2
        self.mlp = mlp
        self.ls_2 = ls_2
        self.activation: Activation = activation
        self.can_fuse = self._can_fuse()
        self._wiring: Wiring | None = None
        self.training = False

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Any float type [B, L, D] (or [L, B, D]) -> the same; attn_mask None or causal."""
        if k_x is not None or v_x is not None:
            raise NotImplementedError("Int8Block: k_x and v_x must be None (self-attention only)")
        wiring = self._wired() if self.can_fuse else None
        if wiring is None or wiring.has_hooks():
            return self._forward_by_child(q_x, attn_mask)
        if wiring.attn.batch_first:
            return self._forward_fused(q_x, attn_mask, wiring)
        return self._forward_fused(q_x.transpose(0, 1), attn_mask, wiring).transpose(0, 1)

    def gives_first_alone(self) -> bool:
        """Whether `first_token` may stand for a call: fused, and no hook would see the call."""
        return self.can_fuse and not is_hooked(self) and not self._wired().has_hooks()

    def first_token(self, x: Tensor) -> Tensor:
        """Of [B, L, D], whatever batch_first says, the first token after the block: [B, 1, D].

        The bits of forward(x)[:, :1]. The other tokens stay keys and values: three quarters of the
        block's products are not made. Needs `gives_first_alone`.
        """
        return self._forward_fused(x, None, self._wired(), first_only=True)

    def train(self, mode: bool = True) -> "Int8Block":
        """Raises: an int8 block has no gradients."""
        if mode:
            raise RuntimeError(TRAIN_REFUSED)
        return super().train(False)

    def get_weight_dtype(self) -> torch.dtype:
        """The type computed for; open_clip asks each block."""
        c_fc = self.mlp.get_submodule("c_fc")
        return c_fc.dtype if isinstance(c_fc, Int8Linear) else cast(nn.Linear, c_fc).weight.dtype

    def __getstate__(self) -> dict[str, Any]:
        """All but what is found again in the copy."""
        return {**self.__dict__, "_wiring": None}

    def _wired(self) -> "Wiring":
        wiring = self._wiring
        if wiring is None or not wiring.is_of(self):
            wiring = self._wiring = Wiring(self)
        return wiring

    def _forward_fused(
        self, x: Tensor, attn_mask: Tensor | None, wiring: "Wiring", *, first_only: bool = False
    ) -> Tensor:
        block = wiring.operands(causal=is_causal(attn_mask, x.shape[1]), activation=self.activation)
        return operators(wiring.attn.backend).int8_block(x, block, first_only)  # type: ignore[no-any-return]

    def _forward_by_child(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        if isinstance(self.attn, Int8MultiheadAttention):
            y = self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        else:
            y = self.attn(y, attn_mask=attn_mask)
        y = self.ln_attn(y) if "ln_attn" in self._modules else y
        x = x + self.ls_1(y)
        return cast(Tensor, x + self.ls_2(self.mlp(self.ln_2(x))))

    def linears(self) -> tuple[Int8Linear, Int8Linear, Int8Linear, Int8Linear]:
        """in_proj, out_proj, c_fc, c_proj."""
        found = (self.attn.in_proj, self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj)
        return cast(tuple[Int8Linear, Int8Linear, Int8Linear, Int8Linear], found)

    def _can_fuse(self) -> bool:
        linears: tuple[nn.Module, ...] = self.linears()
        norms = (self.ln_1, self.ln_2)
        return (
            all(isinstance(m, Int8Linear) and m.rounding.startswith("row") for m in linears)
            and all(m.weight is not None and m.bias is not None for m in norms)
            and self.attn.is_int8
        )


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook sees the calls of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Wiring:
    """The dicts in which a block and its children keep tensors, children and hooks.

    Looking through the twenty modules of a block takes 28 us, and 72 us where a tower's weights
    have pushed them out of the caches: 6 % of a ViT-B/32 at batch 1 (2 threads of a Zen 4). The
    dicts are a module's own for its life, so a call reads from them what is there now.

    Args:
      block: one that can_fuse.
    """

    def __init__(self, block: Int8Block) -> None:
        """See the class."""
        attn, linears = block.attn, block.linears()
        self.attn = attn
        self._of_block, self._of_attn = block._modules, attn._modules
        self._of_mlp = block.mlp._modules
        self._children = self._children_now()
        parts = [m for child in block.children() for m in (child, *child.children())]
        self._hooks = [h for m in parts for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._linears = [linear._buffers for linear in linears]
        self._norms = [block.ln_1, block.ln_2]
        self._scales = [scale._parameters for scale in (block.ls_1, block.ls_2)]
        self._symmetric = [linear.rounding == "row_symmetric" for linear in linears]

    def _children_now(self) -> list[nn.Module | None]:
        return [*self._of_block.values(), *self._of_attn.values(), *self._of_mlp.values()]

    def is_of(self, block: Int8Block) -> bool:
        """Whether the block still has the children that were looked up."""
        return block._modules is self._of_block and self._children_now() == self._children

    def has_hooks(self) -> bool:
        """Whether a child carries a hook."""
        return any(self._hooks)

    def operands(self, *, causal: bool, activation: str) -> BlockOperands:
        """Those of int8_block, as they are now."""
        norm_1, norm_2 = self._norms
        in_proj, out_proj, c_fc, c_proj = self._linears
        scale_1, scale_2 = self._scales
        return BlockOperands(
            _norm(norm_1), packed_linear(in_proj), packed_linear(out_proj, _gamma(scale_1)),
            _norm(norm_2), packed_linear(c_fc), packed_linear(c_proj, _gamma(scale_2)),
            self._symmetric, self.attn.num_heads, causal, activation,
        )  # fmt: skip


TRAIN_REFUSED = (
    "train: an accelerated tower has int8 weights and no gradients; train the float model"
    " (lraee.restore), then accelerate it"
)


def is_causal(attn_mask: Tensor | None, L: int) -> bool:
    """False for None, True for the causal mask of L tokens.

    Raises: NotImplementedError on any other mask.
    """
    if attn_mask is None:
        return False
    is_hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
    is_shown = ~is_hidden if attn_mask.dtype == torch.bool else attn_mask == 0
    causal = torch.ones(L, L, dtype=torch.bool, device=attn_mask.device).triu(1)
    if attn_mask.shape != (L, L) or not (is_hidden.equal(causal) and is_shown.equal(~causal)):
        raise NotImplementedError(
            f"Int8Block: attn_mask must be None or the causal mask [L, L] = [{L}, {L}],"
            f" got another one of shape {list(attn_mask.shape)}"
        )
    return True


def _norm(norm: nn.LayerNorm) -> Norm:
    """gamma and beta as float32; as they are on a GPU, whose kernels read any float type."""
    gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
    assert gamma is not None and beta is not None  # see Int8Block.can_fuse
    if gamma.is_cuda or (gamma.dtype is torch.float32 and beta.dtype is torch.float32):
        return Norm(gamma, beta, norm.eps)
    return Norm(gamma.float(), beta.float(), norm.eps)


def _gamma(parameters: dict[str, nn.Parameter | None]) -> Tensor | None:
    gamma = parameters.get("gamma")
    return gamma if gamma is None or gamma.is_cuda else gamma.float()
