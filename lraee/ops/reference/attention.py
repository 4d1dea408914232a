"""Definitions of int8_attention and float_attention."""

import math

import torch
from torch import Tensor

from lraee.ops.reference.linear import integer_product
from lraee.ops.reference.rows import SMALLEST_SCALE, divide, quantize_rows

FIXED_POINT_KEYS = range(513, 32769)
"""Numbers of keys of which P V is in fixed point; above, int32 sums could overflow."""
LARGEST_WEIGHT, LARGEST_SUM, LARGEST_VALUE = 32767, 507904, 4095
"""Of a row of P, of its sum, and of a channel of V, there."""


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
    rounded to the type of qkv; P @ V adds in float32. With 513 to 32,768 keys P and V are int16
    and their product is exact: with e = exp(logit - largest) of a row, p_q = round(e * step),
    step = min(32767, 507904 / sum(e)), v_q = round(v * (1 / v_scale)) and v_scale = max|v| / 4095
    of a channel over the keys, P @ V = int32 sum * (1 / (step * sum(e)) * v_scale). A token masked
    by key_mask is no key: it takes no part in the mean, and has no weight. Its own row of the
    result is that of a query.

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
    y: Tensor = (p @ v.double()).transpose(1, 2).reshape(B, L, D)
    return y.to(qkv.dtype)


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
    hidden = torch.zeros(1, K, dtype=torch.bool, device=q.device)
    if queries is not None:
        hidden = keys[None, :] > queries[:, None]
    logit, sees_none = logit.masked_fill(hidden, -math.inf), hidden.all(1, keepdim=True)
    if K in FIXED_POINT_KEYS:
        return torch.where(sees_none, 0.0, _fixed_point(logit, v))
    return torch.where(sees_none, 0.0, torch.softmax(logit, dim=-1)).to(dtype).float() @ v


def _fixed_point(logit: Tensor, v: Tensor) -> Tensor:
    """softmax(logit) @ v of [B, H, L, K] and [B, H, K, d] in int16: see int8_attention."""
    e = torch.exp(logit - logit.amax(-1, keepdim=True))
    total = e.sum(-1, keepdim=True)
    step = LARGEST_SUM / total
    step = step.clamp(max=LARGEST_WEIGHT)
    v_scale = divide(v.abs().amax(2, keepdim=True), LARGEST_VALUE)
    v_scale = torch.where(v_scale < SMALLEST_SCALE, 1.0, v_scale)
    v_scale = torch.where(v_scale.isfinite(), v_scale, math.nan)
    p_q, v_q = torch.round(e * step).nan_to_num(0.0), torch.round(v * (1.0 / v_scale))
    total_q = (p_q.double() @ v_q.nan_to_num(0.0).double()).float()
    return total_q * (1.0 / (step * total) * v_scale)


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates the last R of [B, H, L, d] in halves."""
    cos, sin = rope
    prefix = x.shape[2] - cos.shape[0]
    x1, x2 = x[:, :, prefix:].chunk(2, -1)
    turned = x[:, :, prefix:] * cos + torch.cat([-x2, x1], -1) * sin
    return torch.cat([x[:, :, :prefix], turned], 2)
