"""Self-attention with int8 projections."""

from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.modules import put_module
from lraee.layers.padding import by_valid_tokens, split_mask
from lraee.layers.rope import rope_operand
from lraee.layers.scheme import AttentionKind, attention_on
from lraee.layers.spec import Attention, Call, Rope
from lraee.ops.backend import Backend, operators

PLAIN_CALL = Call(("x", "attn_mask"), mask="attn_mask")


class Int8Attention(nn.Module):
    """Self-attention, called as `spec.call` says; never of the library's own attention class.

    transformers keeps hooks on every module of its attention classes, and a hooked block does not
    run fused.

    Args:
      spec: of the float attention; its linears and norms become children of the same paths.
      children: the int8 (or float) linears in_proj and out_proj, if it holds that, and norms, by
        path in the attention.
      kind: Q K^T in int8, all of attention in float, or which of them the device takes.
      is_sequence_first: tokens are [L, B, D]; else [B, L, D].
      backend: which implementation of int8_attention to run on.
      has_interleaved_angles: in_proj has its rows in halves, the angles that calls bring are
        interleaved.
    """

    def __init__(
        self,
        spec: Attention,
        children: dict[str, nn.Module],
        *,
        kind: AttentionKind = "auto",
        is_sequence_first: bool = False,
        backend: Backend = "auto",
        has_interleaved_angles: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        self.has_interleaved_angles = has_interleaved_angles
        for path, module in children.items():
            put_module(self, path, module)
        self.spec = spec
        self.call = spec.call or PLAIN_CALL
        self.kind: AttentionKind = kind
        self.is_sequence_first = is_sequence_first
        self.backend: Backend = backend
        self.training = False

    def kind_on(self, device: torch.device) -> Literal["int8", "float"]:
        """How it is computed on a device."""
        return attention_on(self.kind, device)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.spec.num_heads

    def forward(self, *args: Any, **named: Any) -> Any:
        """Any float type [B, L, D] -> the same, as `spec.call` says, which may name a mask."""
        x, mask, rope = self.call.read(type(self).__name__, args, named)
        return self.call.wrap(self.project(x, mask, rope))

    def project(self, x: Tensor, mask: Tensor | None = None, rope: Any = None) -> Tensor:
        """out_proj(attention(in_proj(x))), tokens in and out in the order of the float module;
        without out_proj where the block applies that.
        """
        qkv = self._child(self.spec.in_proj.path)(x)
        qkv = qkv.transpose(0, 1) if self.is_sequence_first else qkv
        owner, (B, L) = type(self).__name__, qkv.shape[:2]
        mask, valid = split_mask(mask, B, L, owner, self.spec.is_causal)
        causal = self.spec.is_causal or is_causal(mask, L, owner)
        if valid is not None and not self.spec.masks_keys:
            require_no_rope(rope, owner)
            attend = partial(self.attend, is_causal=causal)
            y = by_valid_tokens(qkv, valid, attend, torch.zeros_like(qkv[..., : qkv.shape[2] // 3]))
        else:
            y = self.attend(qkv, is_causal=causal, key_mask=valid, rope=rope)
        y = y.transpose(0, 1) if self.is_sequence_first else y
        if self.spec.inner_norm is not None:
            y = self._child(self.spec.inner_norm)(y)
        if not self.spec.holds_out_proj:
            return y
        return cast(Tensor, self._child(self.spec.out_proj.path)(y))

    def attend(
        self, qkv: Tensor, *, is_causal: bool, key_mask: Tensor | None = None, rope: Any = None
    ) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V, queries and keys normed and rotated where the spec says so:
        [B, L, 3 H d] -> [B, L, H d]; key_mask as in int8_attention.
        """
        table, is_on_gpu = self._table(rope), qkv.device.type == "cuda"
        is_int8 = self.kind_on(qkv.device) == "int8"
        if table is None or not (is_int8 or is_on_gpu):
            qkv = self._placed(qkv, rope)
        # On a GPU rotary positions are float_attention's: beside int8 scores they spill registers
        if is_int8 and not (is_on_gpu and table is not None):
            return operators(self.backend).int8_attention(  # type: ignore[no-any-return]
                qkv, num_heads=self.num_heads, causal=is_causal, rope=table, key_mask=key_mask
            )
        if is_on_gpu:  # a library chooses its kernel by the batch, and so its bits
            return operators(self.backend).float_attention(  # type: ignore[no-any-return]
                qkv, num_heads=self.num_heads, causal=is_causal, rope=table, key_mask=key_mask
            )
        B, L, width = qkv.shape
        heads = qkv.view(B, L, 3, self.num_heads, width // (3 * self.num_heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if key_mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        else:
            keys = key_mask[:, None, None].expand(B, 1, L, L)
            y = F.scaled_dot_product_attention(q, k, v, keys.tril() if is_causal else keys)
        return y.transpose(1, 2).reshape(B, L, width // 3)

    def _child(self, path: str) -> nn.Module:
        """By its path in the block."""
        return self.get_submodule(path.removeprefix(f"{self.spec.path}."))

    def _table(self, rope: Any) -> Tensor | None:
        """The angles as int8_attention takes them, where it is to rotate."""
        if self.spec.rope is None or rope is None or self.spec.rope.layout != "half":
            return None
        if self.spec.q_norm is not None or self.spec.k_norm is not None:
            return None
        sin, cos = sines_and_cosines(rope)
        return rope_operand(cos, sin, is_interleaved=self.has_interleaved_angles)

    def _placed(self, qkv: Tensor, rope: Any = None) -> Tensor:
        """The same by torch: [B, L, 3 H d] -> [B, L, 3 H d]."""
        is_rotated = self.spec.rope is not None and rope is not None
        if not is_rotated and self.spec.q_norm is None and self.spec.k_norm is None:
            return qkv
        B, L, _ = qkv.shape
        heads = qkv.view(B, L, 3, self.spec.num_heads, self.spec.head_dim)
        q, k, v = heads.unbind(2)
        q = q if self.spec.q_norm is None else self._child(self.spec.q_norm)(q)
        k = k if self.spec.k_norm is None else self._child(self.spec.k_norm)(k)
        if self.spec.rope is not None and rope is not None:
            sin, cos = sines_and_cosines(rope)
            if self.has_interleaved_angles:
                cos, sin = rope_operand(cos, sin, is_interleaved=True)
            q, k = (rotated(each, (cos, sin), self.spec.rope) for each in (q, k))
        return torch.stack([q, k, v], dim=2).view(qkv.shape)


class Int8MultiheadAttention(Int8Attention):
    """The same, called as torch's nn.MultiheadAttention is: self-attention without weights."""

    def forward(
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
        return self.project(query, attn_mask), None


def rotated(x: Tensor, rope: Any, spec: Rope) -> Tensor:
    """x * cos + rotate(x) * sin in float32, per token and pair of channels, in the type of x.

    Args:
      x: queries or keys [B, L, H, d].
      rope: cosines and sines [L - prefix, d] each, a pair; or one tensor [L - prefix, 2 d], sines
        first, as timm has it.
      spec: which tokens and which pairs.
    """
    sin, cos = sines_and_cosines(rope)
    cos, sin = (each.reshape(-1, 1, each.shape[-1]).float() for each in (cos, sin))
    prefix, patches = x[:, : spec.prefix], x[:, spec.prefix :].float()
    if spec.layout == "half":
        first, second = patches.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([prefix, (patches * cos + turned * sin).to(x.dtype)], dim=1)


def require_no_rope(rope: Any, owner: str) -> None:
    """Raises NotImplementedError where tokens that are left out have rotary positions."""
    if rope is not None:
        raise NotImplementedError(
            f"{owner}: attention_mask must be None with rotary positions, got one; use the float"
            " model (lraee.restore)"
        )


def sines_and_cosines(rope: Any) -> tuple[Tensor, Tensor]:
    """[R, d] each, of a pair of cosines and sines, or of one tensor [R, 2 d], sines first."""
    sin, cos = rope.chunk(2, -1) if isinstance(rope, Tensor) else (rope[1], rope[0])
    return sin.reshape(-1, sin.shape[-1]), cos.reshape(-1, cos.shape[-1])


def is_causal(attn_mask: Tensor | None, L: int, owner: str = "Int8Block") -> bool:
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
            f"{owner}: attn_mask must be None or the causal mask [L, L] = [{L}, {L}],"
            f" got another one of shape {list(attn_mask.shape)}"
        )
    return True
