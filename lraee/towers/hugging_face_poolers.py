"""The float modules around the layers of transformers' vision models, computed row by row."""

from typing import Any, cast

import torch
from torch import Tensor

from lraee.layers.batch_invariant import Rowwise, is_fixed, rowwise_linear
from lraee.layers.modules import is_hooked
from lraee.layers.pooling import Latents, RowwiseMap, rowwise_activation


class SiglipMap(RowwiseMap):
    """Siglip(2)MultiheadAttentionPoolingHead."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] and which of them are valid [B, N] -> [B, D].

        An image without a valid token gives zeros.
        """
        valid = None if attention_mask is None else attention_mask.bool()
        if valid is None or bool(valid.all()):
            return cast(Tensor, super().forward(x))
        pooled = x.new_zeros(len(x), x.shape[2])
        counts = valid.sum(1)
        for n in sorted(set(counts.tolist())):
            if n:
                images = counts == n
                tokens = x[images][valid[images]].view(-1, n, x.shape[2])
                pooled[images] = super().forward(tokens)
        return pooled

    def _latents(self) -> Latents:
        head = cast(Any, self)
        attention, backend = head.attention, self.rowwise_backend
        q, k, v = attention.in_proj_weight.chunk(3)
        q_bias, _, v_bias = attention.in_proj_bias.chunk(3)
        queries = rowwise_linear(head.probe[0], q, q_bias, backend)
        return Latents(queries, k, v, v_bias, attention.num_heads)

    def _finish(self, y: Tensor) -> Tensor:
        head = cast(Any, self)
        y = self._linear(y, head.attention.out_proj)
        mlp = head.mlp
        return (y + self._mlp(head.layernorm(y), mlp.fc1, mlp.activation_fn, mlp.fc2))[:, 0]


class Aimv2Map(RowwiseMap):
    """Aimv2AttentionPoolingHead."""

    def _latents(self) -> Latents:
        head = cast(Any, self)
        weight, bias = head.v_proj.weight, head.v_proj.bias
        return Latents(head.cls_token[0], head.k_proj.weight, weight, bias, head.num_heads)

    def _finish(self, y: Tensor) -> Tensor:
        return self._linear(y[:, 0], cast(Any, self).output_proj)


class ClassTokenPooler(Rowwise):
    """ViTPooler and DeiTPooler: activation(linear(class token))."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, E]."""
        pooler = cast(Any, self)
        is_observed = any(is_hooked(m) for m in self.modules() if m is not self)
        if is_observed or not is_fixed(hidden_states.device, self.rowwise_backend):
            return cast(Tensor, super().forward(hidden_states))
        first, dense = hidden_states[:, 0], pooler.dense
        y = rowwise_linear(first, dense.weight, dense.bias, self.rowwise_backend)
        return rowwise_activation(pooler.activation, y)


class NaflexEmbeddings(Rowwise):
    """Siglip2VisionEmbeddings, image by image: the positions of each are resized by a product whose
    sums differ with the longest image of the batch. Padding rows are zeros.
    """

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Patches [B, N, K] and their rows and columns [B, 2] -> tokens [B, N, D]."""
        D = cast(Any, self).embed_dim
        B, N = pixel_values.shape[:2]
        result = torch.zeros(
            B,
            N,
            D,
            dtype=cast(Any, self).position_embedding.weight.dtype,
            device=pixel_values.device,
        )
        for b, n in enumerate(spatial_shapes.prod(1).tolist()):
            one = slice(b, b + 1)
            result[one, :n] = super().forward(pixel_values[one, :n], spatial_shapes[one])
        return result
