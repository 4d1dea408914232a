"""Definitions of int8_attention and float_attention."""

import math

import torch
from torch import Tensor

from lraee.ops.reference.linear import integer_product
from lraee.ops.reference.rows import divide, quantize_rows


def int8_attention(
    qkv: Tensor,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8, one scale per token and head.

    The last R tokens of Q and K are rotated first, where rope is given. K is then centred on its
    mean over tokens: that adds the same number to every score of a query, which softmax does not
    see, and it takes the large common part out of K's range (SageAttention, arXiv 2410.02367).
    score_ij = int32 sum; logit = score_ij * ((q_scale_i * d^-1/2) * k_scale_j) in float32; P is
    rounded to the type of qkv; P @ V adds in float32. A token masked by key_mask is no key: it
    takes no part in the mean, and has no weight. Its own row of the result is that of a query.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D]: Q, K, V side by side, each head by head.
      num_heads: H, a divisor of D; d = D / H.
      causal: token i sees tokens 0..i only.
      rope: float32 [2, R, d] or None: cos and sin of the last R <= L tokens, half layout, d even:
        (x1, x2) -> (x1, x2) * cos + (-x2, x1) * sin, each step rounded to float32.
      key_mask: bool [B, L] or None: True where a token is a key. A query without keys gives 0.
    Returns: [B, L, D] in the type of qkv. A NaN or Inf spoils its own image, no other; in a masked
      token its own row alone.
    """
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    q, k, v = qkv.view(B, L, 3, num_heads, d).permute(2, 0, 3, 1, 4).float()
    if rope is not None:
        q, k = _rotated(q, rope), _rotated(k, rope)
    tokens = torch.arange(L, device=qkv.device)
    if key_mask is None:
        y = _attend(q, k, v, tokens, tokens if causal else None, qkv.dtype)
    else:
        y = torch.zeros_like(q)
        for b, valid in enumerate(key_mask):
            keys = tokens[valid]
            image = (q[b : b + 1], k[b : b + 1, :, valid], v[b : b + 1, :, valid])
            if len(keys):
                y[b] = _attend(*image, keys, tokens if causal else None, qkv.dtype)[0]
    return y.transpose(1, 2).reshape(B, L, D).to(qkv.dtype)


def float_attention(
    qkv: Tensor,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of Q, K and V as they are, in float64, rounded once at the end.

    Rotated queries and keys are computed in float32 and rounded to the type of qkv. A masked token
    is no key; its own row of the result is that of a query.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D]: Q, K, V side by side, each head by head.
      num_heads: H, a divisor of D; d = D / H.
      causal: token i sees tokens 0..i only.
      rope: as in int8_attention.
      key_mask: bool [B, L] or None: True where a token is a key. A query without keys gives 0.
    Returns: [B, L, D] in the type of qkv. A NaN or Inf spoils its own image, no other; in a masked
      token its own row alone.
    """
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    q, k, v = qkv.view(B, L, 3, num_heads, d).permute(2, 0, 3, 1, 4)
    if rope is not None:
        q, k = (_rotated(each.float(), rope).to(qkv.dtype) for each in (q, k))
    hidden = torch.zeros(B, 1, L, L, dtype=torch.bool, device=qkv.device)
    if causal:
        hidden = hidden | torch.ones(L, L, dtype=torch.bool, device=qkv.device).triu(1)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
        k = torch.where(key_mask[:, None, :, None], k, 0.0)
        v = torch.where(key_mask[:, None, :, None], v, 0.0)
    logit = q.double() @ k.double().mT / math.sqrt(d)
    p = torch.softmax(logit.masked_fill(hidden, -math.inf), dim=-1)
    p = torch.where(hidden.all(-1, keepdim=True), 0.0, p)
    return (p @ v.double()).transpose(1, 2).reshape(B, L, D).to(qkv.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The keys of token numbers `keys`; where `queries` are given, each sees none behind it."""
    B, H, L, d = q.shape
    K = k.shape[2]
    total = torch.zeros_like(k[:, :, 0])
    for token in range(K):
        total = total + k[:, :, token]
    k = k - divide(total, K)[:, :, None]
    q_q, q_scale, _ = quantize_rows(q.reshape(-1, d), True)
    k_q, k_scale, _ = quantize_rows(k.reshape(-1, d), True)
    score = integer_product(q_q.view(B, H, L, d), k_q.view(B, H, K, d))
    root = torch.tensor(1.0 / math.sqrt(d), dtype=torch.float32, device=q.device)
    steps = (q_scale * root).view(B, H, L, 1) * k_scale.view(B, H, 1, K)
    logit = score.float() * steps
    if queries is None:
        return torch.softmax(logit, dim=-1).to(dtype).float() @ v
    hidden = keys[None, :] > queries[:, None]
    p = torch.softmax(logit.masked_fill(hidden, -math.inf), dim=-1)
    p = torch.where(hidden.all(1, keepdim=True), 0.0, p)
    return p.to(dtype).float() @ v


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates the last R of [B, H, L, d] in halves."""
    cos, sin = rope
    prefix = x.shape[2] - cos.shape[0]
    x1, x2 = x[:, :, prefix:].chunk(2, -1)
    turned = x[:, :, prefix:] * cos + torch.cat([-x2, x1], -1) * sin
    return torch.cat([x[:, :, :prefix], turned], 2)
