"""Attention pooling: learned queries over the tokens of an image, computed row by row."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import is_fixed, rowwise_linear
from lraee.ops.backend import Backend


class RowwiseAttention(nn.MultiheadAttention):
    """The attention of a pooler: learned queries over the tokens of an image.

    An nn.MultiheadAttention with tokens [B, L, D] becomes one by `RowwiseAttention.adopt`.
    """

    backend: Backend

    @classmethod
    def adopt(cls, attention: nn.Module, backend: Backend) -> None:
        """Turns an nn.MultiheadAttention into this class; leaves any other module alone."""
        if type(attention) is nn.MultiheadAttention and attention.bias_k is None:
            attention.__class__ = cls
            cast(RowwiseAttention, attention).backend = backend

    @classmethod
    def release(cls, attention: nn.Module) -> None:
        """The way back."""
        if isinstance(attention, cls):
            attention.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            del attention.backend

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = True,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; without weights and masks, row by row."""
        is_own = is_fixed(query.device, self.backend)
        if not is_own or need_weights or options:
            return super().forward(query, key, value, need_weights=need_weights, **options)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            rowwise_linear(x, w, b, self.backend)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        heads = (t.chunk(self.num_heads, dim=-1) for t in (q, k, v))
        y = torch.cat([self._attend(*head) for head in zip(*heads, strict=True)], dim=-1)
        out = self.out_proj
        return rowwise_linear(y, out.weight, out.bias, self.backend), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of one head: [B, Q, d], [B, L, d], [B, L, d] -> [B, Q, d].

        torch's own splits a single query among the threads as the batch has it.
        """
        q = q * q.shape[-1] ** -0.5
        images = []
        for q_one, k_one, v_one in zip(q.unbind(), k.unbind(), v.unbind(), strict=True):
            p = rowwise_linear(q_one, k_one, None, self.backend).softmax(-1)
            images.append(rowwise_linear(p, v_one.t(), None, self.backend))
        return torch.stack(images)
