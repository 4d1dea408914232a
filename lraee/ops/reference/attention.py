"""Definition of int8_attention."""

import math

import torch
from torch import Tensor

from lraee.ops.reference.linear import integer_product
from lraee.ops.reference.rows import divide, quantize_rows


def int8_attention(qkv: Tensor, num_heads: int, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8, one step per token and head.

    K is first centred on its mean over tokens: that adds the same number to every score of a
    query, which softmax does not see, and it takes the large common part out of K's range
    (SageAttention, arXiv 2410.02367). score_ij = int32 sum; logit = score_ij * ((q_scale_i *
    d^-1/2) * k_scale_j) in float32; P is rounded to the type of qkv; P @ V adds in float32.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D]: Q, K, V side by side, each head by head.
      num_heads: H, a divisor of D; d = D / H.
      causal: token i sees tokens 0..i only.
    Returns: [B, L, D] in the type of qkv. A NaN or Inf spoils its own image, no other.
    """
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    q, k, v = qkv.view(B, L, 3, num_heads, d).permute(2, 0, 3, 1, 4).float()
    total = torch.zeros_like(k[:, :, 0])
    for token in range(L):
        total = total + k[:, :, token]
    k = k - divide(total, L)[:, :, None]
    q_q, q_scale, _ = quantize_rows(q.reshape(-1, d), True)
    k_q, k_scale, _ = quantize_rows(k.reshape(-1, d), True)
    shape = (B, num_heads, L, d)
    score = integer_product(q_q.view(shape), k_q.view(shape))
    root = torch.tensor(1.0 / math.sqrt(d), dtype=torch.float32, device=qkv.device)
    steps = (q_scale * root).view(B, num_heads, L, 1) * k_scale.view(B, num_heads, 1, L)
    logit = score.float() * steps
    if causal:
        hidden = torch.ones(L, L, dtype=torch.bool, device=qkv.device).triu(1)
        logit = logit.masked_fill(hidden, -math.inf)
    p = torch.softmax(logit, dim=-1).to(qkv.dtype)
    y = p.float() @ v
    return y.transpose(1, 2).reshape(B, L, D).to(qkv.dtype)  # type: ignore[no-any-return]
