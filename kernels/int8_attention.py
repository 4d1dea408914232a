"""int8_attention for CUDA: int8 scores, float probabilities, one launch.

Q, K and V are read where the projection left them (qkv [B, L, 3 D], any token stride), and gone
through once, 64 keys at a time. Holding the scores of all keys in registers, as far as 320 tokens,
left room for 8 warps an SM and was ten times slower than torch's attention at 197 tokens (H200).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, live_rows
from lraee.kernels.common import (
    INFINITY,
    INTERPRETED,
    convert,
    quantize_tile,
    quantizer,
    tile_range,
)
from lraee.kernels.configs import AttentionConfig, attention_config

BLOCK_J = tl.constexpr(64)
"""Keys of one tile."""


@triton.jit
def _is_key(mask_ptr, offs_l, L, HAS_KEY_MASK: tl.constexpr):
    """Whether tokens are keys."""
    is_key = offs_l < L
    if HAS_KEY_MASK:
        is_key = is_key & (tl.load(mask_ptr + offs_l, mask=is_key, other=0) != 0)
    return is_key


@triton.jit
def _mean_key(
    k_ptr, mask_ptr, L, stride_l, offs_d, d, HAS_KEY_MASK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mean of the keys of one head over tokens, summed in token order, UNROLL loads in flight."""
    BLOCK_D: tl.constexpr = offs_d.shape[0]
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.cast(L, tl.float32)
    if HAS_KEY_MASK:
        count = tl.cast(0.0, tl.float32)
    for first in range(0, L, UNROLL):
        for u in tl.static_range(UNROLL):
            token = first + u
            is_key = token < L
            if HAS_KEY_MASK:
                is_key = is_key & (tl.load(mask_ptr + token, mask=is_key, other=0) != 0)
                count += is_key.to(tl.float32)
            mask = (offs_d < d) & is_key
            row_ptr = k_ptr + token * stride_l
            total += tl.load(row_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if HAS_KEY_MASK:
        count = tl.maximum(count, 1.0)
    return tl.div_rn(total, count)


@triton.jit
def _quantize_heads(ptr, mean, offs_l, is_row, stride_l, offs_d, d):
    """int8 rows of one head, centred on mean, and their scales."""
    mask = is_row[:, None] & (offs_d < d)[None, :]
    x = tl.load(ptr + offs_l[:, None] * stride_l + offs_d[None, :], mask=mask, other=0.0)
    x = tl.where(mask, x.to(tl.float32) - mean[None, :], 0.0)
    lo, hi = tile_range(x)
    scale, zero, is_valid = quantizer(lo, hi, True)
    return quantize_tile(x, scale, zero, is_valid, True), scale


@triton.jit
def _logits(q_q, q_step, k_q, k_scale, offs_i, offs_j, is_key, IS_CAUSAL: tl.constexpr):
    """float32 scores of a tile, -inf where a query does not see a key."""
    score = tl.dot(q_q, tl.trans(k_q), out_dtype=tl.int32)
    logit = score.to(tl.float32) * (q_step[:, None] * k_scale[None, :])
    is_visible = is_key[None, :]
    if IS_CAUSAL:
        is_visible = is_visible & (offs_j[None, :] <= offs_i[:, None])
    return tl.where(is_visible, logit, -INFINITY)


@triton.jit
def _add_values(acc, p, v_ptr, offs_j, is_key, stride_l, offs_d, d):
    """acc + p @ v for one tile of keys, p in the type of v."""
    mask = is_key[:, None] & (offs_d < d)[None, :]
    v = tl.load(v_ptr + offs_j[:, None] * stride_l + offs_d[None, :], mask=mask, other=0.0)
    p = convert(p, v.dtype)
    if INTERPRETED:
        p, v = p.to(tl.float32), v.to(tl.float32)
    return tl.dot(p, v, acc, input_precision="ieee")


@triton.jit
def _attend(q_q, q_step, k_ptr, v_ptr, mask_ptr, k_mean, offs_i, L, stride_l, offs_d, d,
            IS_CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr):  # fmt: skip
    """Output of one tile of queries in one pass over the keys, tile by tile.

    p = exp(logit - best so far) is added up as it comes; where a later tile holds a larger logit,
    sums made before shrink by exp(best - new best). Dividing by the total comes last. With a mask a
    query may see no key of a tile: its best is then a number that leaves every p and shrink 0.
    """
    best = tl.full(q_step.shape, -INFINITY, tl.float32)
    total = tl.zeros_like(best)
    acc = tl.zeros(q_q.shape, tl.float32)
    for j in range(0, L, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)
        is_key = _is_key(mask_ptr, offs_j, L, HAS_KEY_MASK)
        k_q, k_scale = _quantize_heads(k_ptr, k_mean, offs_j, is_key, stride_l, offs_d, d)
        logit = _logits(q_q, q_step, k_q, k_scale, offs_i, offs_j, is_key, IS_CAUSAL)
        new_best = tl.maximum(best, tl.max(logit, axis=1))
        if HAS_KEY_MASK:
            new_best = tl.where(new_best == -INFINITY, -3.0e38, new_best)
        shrink = tl.exp(best - new_best)
        p = tl.exp(logit - new_best[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = _add_values(acc * shrink[:, None], p, v_ptr, offs_j, is_key, stride_l, offs_d, d)
        best = new_best
    if HAS_KEY_MASK:
        total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None]


@triton.jit(do_not_specialize=["L", "num_queries"])
def _int8_attention_kernel(
    qkv_ptr, y_ptr, mask_ptr, live_ptr, L, num_queries, H, d, stride_b, stride_l, root,
    HAS_LIVE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[b, i, h] = softmax(logit[i]) @ v for BLOCK_I of the queries i < num_queries of one head.

    k is centred on its mean over tokens; logit_ij = s_ij * ((q_scale_i * root) * k_scale_j) with
    s the int8 product and root = d^-1/2.
    """
    item = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_I)
    head = (item // tiles) % H
    image = (item // tiles // H).to(tl.int64)
    if HAS_LIVE and image >= tl.load(live_ptr):
        return
    offs_i = (item % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + image * stride_b + head * d
    k_ptr = q_ptr + H * d
    v_ptr = k_ptr + H * d
    mask_ptr += image * L
    no_mean = tl.zeros((BLOCK_D,), tl.float32)
    q_q, q_scale = _quantize_heads(q_ptr, no_mean, offs_i, offs_i < L, stride_l, offs_d, d)
    q_step = q_scale * root
    k_mean = _mean_key(k_ptr, mask_ptr, L, stride_l, offs_d, d, HAS_KEY_MASK, UNROLL)
    y = _attend(
        q_q, q_step, k_ptr, v_ptr, mask_ptr, k_mean, offs_i, L, stride_l, offs_d, d, IS_CAUSAL,
        HAS_KEY_MASK,
    )  # fmt: skip
    y_rows = y_ptr + (image * num_queries + offs_i)[:, None] * (H * d) + head * d
    mask = (offs_i < num_queries)[:, None] & (offs_d < d)[None, :]
    tl.store(y_rows + offs_d[None, :], convert(y, y_ptr.dtype.element_ty), mask=mask)


def int8_attention(
    qkv: Tensor,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    num_queries: int | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8; see lraee.ops.reference.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D], read in place.
      num_heads: H, a divisor of D.
      causal: token i sees tokens 0..i only.
      rope: None; an argument of the operator that float_attention has.
      key_mask: bool [B, L] or None: the tokens that are keys. Masked tokens behind all keys change
        no bit; before or between them they change the tiles in which probabilities are added.
      num_queries: how many of the tokens, from the first on, are queries; all L when None.
      config: queries and warps of a program; chosen by shape when None.
    Returns: [B, num_queries, D] in the type of qkv.
    """
    if rope is not None:
        raise NotImplementedError(
            "int8_attention: rope must be None on a GPU, got rotary positions: beside int8 scores"
            " the rotation spills registers; use float_attention"
        )
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    config = config or attention_config(L, d, causal, has_mask=key_mask is not None)
    num_queries = L if num_queries is None else num_queries
    y = torch.empty((B, num_queries, D), dtype=qkv.dtype, device=qkv.device)
    programs = B * num_heads * triton.cdiv(num_queries, config.block_i)
    if not programs:
        return y
    live_ptr, per_image, has_live = live_rows.operands(B, y)
    assert per_image <= 1, f"int8_attention: B must be the images of live_rows, got {B}"
    launch.start(
        _int8_attention_kernel,
        (programs,),
        qkv, y, y if key_mask is None else key_mask.contiguous().view(torch.int8), live_ptr,
        L, num_queries, num_heads, d, qkv.stride(0), qkv.stride(1), 1.0 / math.sqrt(d),
        HAS_LIVE=has_live, IS_CAUSAL=causal, HAS_KEY_MASK=key_mask is not None,
        BLOCK_I=config.block_i, BLOCK_D=max(32, triton.next_power_of_2(d)), UNROLL=config.unroll,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
