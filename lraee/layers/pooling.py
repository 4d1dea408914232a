"""Pooling of an image's tokens, computed row by row: means, and attention of learned queries."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import Rowwise, is_fixed, rowwise_linear
from lraee.layers.modules import is_hooked
from lraee.ops.backend import Backend


def rowwise_mean(x: Tensor, backend: Backend) -> Tensor:
    """The mean over tokens, [B, N, D] -> [B, D] in the type of x, in one fixed order of sums.

    torch's own sum adds in another order at the end of a thread's share of the channels.
    """
    if not is_fixed(x.device, backend):
        return x.mean(1)
    B, N, D = x.shape
    share = torch.full((1, N), 1.0 / N, device=x.device)
    rows = [rowwise_linear(share, one.float().t(), None, backend) for one in x.unbind()]
    return torch.cat([x.new_empty(0, D), *(row.to(x.dtype) for row in rows)])


def rowwise_activation(activation: nn.Module, x: Tensor) -> Tensor:
    """The activation of each image's rows, [B, N] -> [B, N].

    One image at a time: torch's kernels end a thread's share of a tensor with scalar code, whose
    exponentials have other bits.
    """
    return torch.stack([activation(row) for row in x.unbind()]) if len(x) else x


@dataclass(frozen=True)
class Latents:
    """Queries that are the same for every image, and what their keys and values are made of.

    Args:
      queries: [Q, H d], projected.
      key_weight: [H d, D]. A bias of keys adds one number to all scores of a query, which softmax
        does not see.
      value_weight: [H d, D].
      value_bias: [H d] or None.
      num_heads: H.
    """

    queries: Tensor
    key_weight: Tensor
    value_weight: Tensor
    value_bias: Tensor | None
    num_heads: int


def attend_latents(x: Tensor, latents: Latents, backend: Backend) -> Tensor:
    """softmax(q (W_k x)^T / sqrt(d)) (W_v x + b_v) of each head: [B, N, D] -> [B, Q, H d] float32.

    Queries do not depend on the image. So a head's scores are x (W_k^T q), and its values W_v of
    the weighted sum of x: neither keys nor values of the tokens are ever made, which takes
    2 N D (H Q) multiply-adds an image in place of 2 N D^2.
    """
    H = latents.num_heads
    B, N, D = x.shape
    Q, width = latents.queries.shape
    d = width // H
    wide = x.float()
    queries = (latents.queries.float() * d**-0.5).unflatten(1, (H, d))
    heads = [slice(h * d, (h + 1) * d) for h in range(H)]
    keys = torch.cat(
        [
            rowwise_linear(queries[:, h], latents.key_weight[rows].float().t(), None, backend)
            for h, rows in enumerate(heads)
        ]
    )
    scores = rowwise_linear(wide.reshape(B * N, D), keys, None, backend).view(B, N, H * Q)
    p = scores.transpose(1, 2).contiguous().softmax(-1)
    sums = [rowwise_linear(p[b], wide[b].t(), None, backend) for b in range(B)]
    pooled = torch.stack(sums).view(B, H, Q, D) if B else wide.new_empty(0, H, Q, D)
    weight, bias = latents.value_weight.float(), latents.value_bias
    values = [
        rowwise_linear(
            pooled[:, h], weight[rows], None if bias is None else bias[rows].float(), backend
        )
        for h, rows in enumerate(heads)
    ]
    return torch.cat(values, -1)


class RowwiseMap(Rowwise):
    """Pooling by attention of learned queries (MAP), the same bits in any batch.

    A family's adapter reads its library's module in `_latents` and `_finish`. Where a hook sees a
    child, or the call is more than tokens, it runs the library's own forward.
    """

    def _latents(self) -> Latents:
        """Queries and weights, as they are now."""
        raise NotImplementedError

    def _finish(self, y: Tensor) -> Tensor:
        """What follows attention: [B, Q, H d] -> as the library's module returns it."""
        raise NotImplementedError

    def _tokens(self, x: Tensor) -> Tensor:
        """What is attended to: [B, N, D] -> the same."""
        return x

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Tokens [B, N, D] -> what the library's module returns."""
        is_bare = not any(value is not None for value in (*args, *options.values()))
        is_observed = any(is_hooked(m) for m in self.modules() if m is not self)
        if not is_bare or is_observed or not is_fixed(x.device, self.rowwise_backend):
            return super().forward(x, *args, **options)
        y = attend_latents(self._tokens(x), self._latents(), self.rowwise_backend)
        return self._finish(y.to(x.dtype))

    def _linear(self, x: Tensor, linear: nn.Module) -> Tensor:
        """A float nn.Linear with one order of sums."""
        held = cast(nn.Linear, linear)
        return rowwise_linear(x, held.weight, held.bias, self.rowwise_backend)

    def _mlp(self, x: Tensor, fc1: nn.Module, activation: nn.Module, fc2: nn.Module) -> Tensor:
        """fc2(activation(fc1(x)))."""
        return self._linear(rowwise_activation(activation, self._linear(x, fc1)), fc2)


class RowwiseAttention(Rowwise):
    """The attention of a pooler: learned queries over the tokens [B, L, D] of an image."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is an nn.MultiheadAttention without a row of its own among the keys."""
        return type(module) is nn.MultiheadAttention and module.bias_k is None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **options: Any
    ) -> Any:
        """As nn.MultiheadAttention; without weights and masks, row by row."""
        module, backend = cast(nn.MultiheadAttention, self), self.rowwise_backend
        if not is_fixed(query.device, backend) or need_weights or options:
            return super().forward(query, key, value, need_weights=need_weights, **options)
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        q, k, v = (
            rowwise_linear(x, w, b, backend)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        heads = (t.chunk(module.num_heads, dim=-1) for t in (q, k, v))
        y = torch.cat([self._attend(*head) for head in zip(*heads, strict=True)], dim=-1)
        out = module.out_proj
        return rowwise_linear(y, out.weight, out.bias, backend), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of one head: [B, Q, d], [B, L, d], [B, L, d] -> [B, Q, d].

        torch's own splits a single query among the threads as the batch has it.
        """
        q = q * q.shape[-1] ** -0.5
        images = []
        for q_one, k_one, v_one in zip(q.unbind(), k.unbind(), v.unbind(), strict=True):
            p = rowwise_linear(q_one, k_one, None, self.rowwise_backend).softmax(-1)
            images.append(rowwise_linear(p, v_one.t(), None, self.rowwise_backend))
        return torch.stack(images)
