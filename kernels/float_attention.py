"""float_attention for CUDA: softmax(Q K^T / sqrt(d)) V on tensor cores, one pass over the keys.

Q, K and V are read where the projection left them (qkv [B, L, 3 D], any token stride). A head of d
channels is held as tiles of decreasing powers of two that cover d with less than 16 channels of
padding (80 = 64 + 16): tl.arange knows powers of two alone, and one tile of 128 would multiply 48
zeros of each 80 channels.

Tiles follow from L and d alone, so the order of sums, and each bit, is the same in any batch.

float_attention_quantized gives its rows quantized, for the projection that follows, in that launch.
A program owns a head and a row spans all heads: programs behind those of the heads quantize a row
each, once its heads are stored (see tickets). That pays for few rows alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, live_rows, workspace
from lraee.kernels.common import INFINITY, INTERPRETED, convert
from lraee.kernels.configs import (
    WORKSPACE_TICKETS,
    FloatAttentionConfig,
    float_attention_config,
    head_tiles,
    piece_config,
)
from lraee.kernels.operands import AttentionOperands
from lraee.kernels.quantize_rows import Quantized, empty_quantized, quantize_block
from lraee.kernels.tickets import arrive, draw, leave, wait_for
from lraee.kernels.workspace import Workspace

LOWEST = tl.constexpr(-3.0e38)
"""Stands for the largest logit of a query that has seen no key: exp2(-inf - LOWEST) is 0."""


@triton.jit
def _load_tile(ptr, rope_ptr, offs_l, is_row, stride_l, FIRST: tl.constexpr, WIDTH: tl.constexpr,
               d: tl.constexpr, R, prefix, HAS_ROPE: tl.constexpr,
               IS_MASKED: tl.constexpr):  # fmt: skip
    """Channels FIRST .. FIRST + WIDTH - 1 of rows of one head, rotated where HAS_ROPE, 0 beyond d.

    Rotation is in float32, its result in the type of the rows: see the definition.
    """
    offs_d = FIRST + tl.arange(0, WIDTH)
    rows = ptr + offs_l[:, None] * stride_l
    if not IS_MASKED and FIRST + WIDTH <= d and not HAS_ROPE:
        return tl.load(rows + offs_d[None, :])
    mask = is_row[:, None] & (offs_d < d)[None, :]
    x = tl.load(rows + offs_d[None, :], mask=mask, other=0.0)
    if HAS_ROPE:
        HALF: tl.constexpr = d // 2
        is_low = (offs_d < HALF)[None, :]
        offs_other = tl.where(offs_d < HALF, offs_d + HALF, offs_d - HALF)
        other = tl.load(rows + offs_other[None, :], mask=mask, other=0.0).to(tl.float32)
        is_turned = mask & (offs_l >= prefix)[:, None]
        angles = rope_ptr + (offs_l - prefix)[:, None] * d + offs_d[None, :]
        cos = tl.load(angles, mask=is_turned, other=1.0)
        sin = tl.load(angles + R * d, mask=is_turned, other=0.0)
        turned = x.to(tl.float32) * cos + tl.where(is_low, -other, other) * sin
        x = tl.where(is_turned, convert(turned, x.dtype), x)
    return x


@triton.jit
def _load_head(ptr, rope_ptr, offs_l, is_row, stride_l, TILES: tl.constexpr, d: tl.constexpr, R,
               prefix, HAS_ROPE: tl.constexpr, IS_MASKED: tl.constexpr):  # fmt: skip
    """Rows of one head as a tuple of tiles."""
    head = ()
    for t in tl.static_range(len(TILES)):
        tile = _load_tile(ptr, rope_ptr, offs_l, is_row, stride_l, TILES[t][0], TILES[t][1], d, R,
                          prefix, HAS_ROPE, IS_MASKED)  # fmt: skip
        head = head + (tile,)  # type: ignore[assignment]
    return head


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of one tile; Triton 3.6 takes no shape with a number out of a tuple in it."""
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; the interpreter multiplies in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _add_keys(
    q, acc, best, total, k_ptr, v_ptr, rope_ptr, mask_ptr, offs_i, first_key, L, scale, stride_l,
    TILES: tl.constexpr, d: tl.constexpr, R, prefix, IS_CAUSAL: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_KEY_MASK: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys: (acc, best, total) with it. scale = log2(e) / sqrt(d)."""
    offs_j = first_key + tl.arange(0, BLOCK_J)
    is_key = offs_j < L
    if HAS_KEY_MASK:
        is_key = is_key & (tl.load(mask_ptr + offs_j, mask=is_key, other=0) != 0)
    k = _load_head(k_ptr, rope_ptr, offs_j, is_key, stride_l, TILES, d, R, prefix, HAS_ROPE,
                   IS_MASKED)  # fmt: skip
    score = tl.zeros((offs_i.shape[0], BLOCK_J), tl.float32)
    for t in tl.static_range(len(TILES)):
        score = _dot(q[t], tl.trans(k[t]), score, PRECISION)
    if IS_MASKED:
        is_visible = is_key[None, :]
        if IS_CAUSAL:
            is_visible = is_visible & (offs_j[None, :] <= offs_i[:, None])
        score = tl.where(is_visible, score, -INFINITY)
    new_best = tl.maximum(best, tl.max(score, axis=1) * scale)
    factor = tl.full(score.shape, scale, tl.float32)
    p = tl.exp2(tl.fma(score, factor, tl.broadcast_to(-new_best[:, None], score.shape)))
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(p, axis=1)
    v = _load_head(v_ptr, rope_ptr, offs_j, is_key, stride_l, TILES, d, R, prefix, False,
                   IS_MASKED)  # fmt: skip
    p = convert(p, v[0].dtype)
    sums = ()
    for t in tl.static_range(len(TILES)):
        tile = _dot(p, v[t], acc[t] * shrink[:, None], PRECISION)
        sums = sums + (tile,)  # type: ignore[assignment]
    return sums, new_best, total


@triton.jit
def _quantize_row(
    y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, live_ptr, row, num_queries, H, d,
    HAS_LIVE: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_I: tl.constexpr, ROW_K: tl.constexpr,
    IS_ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Quantizes one row of y when all of its heads are stored."""
    image = row // num_queries
    if HAS_LIVE:
        if image >= tl.load(live_ptr):
            return
    tile = row % num_queries // BLOCK_I
    ticket_ptr += image * tl.cdiv(num_queries, BLOCK_I) + tile
    wait_for(ticket_ptr, H)
    offs_m = row + tl.arange(0, 1)
    quantize_block(
        y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, offs_m, offs_m >= 0, H * d, H * d,
        SYMMETRIC, IS_ONE_TILE, ROW_K, ".cg",
    )  # fmt: skip
    leave(ticket_ptr, H + tl.minimum(num_queries - tile * BLOCK_I, BLOCK_I))


@triton.jit(do_not_specialize=["B", "num_queries"])
def _float_attention_kernel(
    qkv_ptr, y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, rope_ptr, mask_ptr, live_ptr,
    B, L, num_queries, H, R, prefix, stride_b, stride_l, scale, d: tl.constexpr,
    TILES: tl.constexpr, HAS_LIVE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr, QUANTIZES: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROW_K: tl.constexpr, IS_ONE_TILE: tl.constexpr,
):  # fmt: skip
    """BLOCK_I of the queries i < num_queries of one head.

    p = exp2(scale * score - best so far) is added up as it comes; where a later tile holds a larger
    score, sums made before shrink by exp2(best - new best). Dividing by the total comes last. Whole
    tiles of keys are added without a mask, the last one apart.
    QUANTIZES: more programs, after those of the heads, quantize the rows of y.
    """
    tiles = tl.cdiv(num_queries, BLOCK_I)
    item = tl.program_id(0)
    if QUANTIZES:
        item = draw(ticket_ptr, tl.num_programs(0))
        ticket_ptr += 1
        if item >= B * H * tiles:
            _quantize_row(
                y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, live_ptr,
                item - B * H * tiles, num_queries, H, d, HAS_LIVE, SYMMETRIC, BLOCK_I, ROW_K,
                IS_ONE_TILE,
            )  # fmt: skip
            return
    head = (item // tiles) % H
    image = (item // tiles // H).to(tl.int64)
    if HAS_LIVE and image >= tl.load(live_ptr):
        return
    first_query = (item % tiles) * BLOCK_I
    offs_i = first_query + tl.arange(0, BLOCK_I)
    q_ptr = qkv_ptr + image * stride_b + head * d
    k_ptr = q_ptr + H * d
    v_ptr = k_ptr + H * d
    mask_ptr += image * L
    q = _load_head(q_ptr, rope_ptr, offs_i, offs_i < L, stride_l, TILES, d, R, prefix, HAS_ROPE,
                   True)  # fmt: skip
    best = tl.full((BLOCK_I,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    acc = ()
    for t in tl.static_range(len(TILES)):
        acc = acc + (_zeros(BLOCK_I, TILES[t][1]),)  # type: ignore[assignment]
    end = tl.minimum(first_query + BLOCK_I, L) if IS_CAUSAL else L
    MASKS_ALL: tl.constexpr = IS_CAUSAL or HAS_KEY_MASK
    whole = 0 if MASKS_ALL else L // BLOCK_J * BLOCK_J
    for first_key in range(0, whole, BLOCK_J):
        acc, best, total = _add_keys(
            q, acc, best, total, k_ptr, v_ptr, rope_ptr, mask_ptr, offs_i, first_key, L, scale,
            stride_l, TILES, d, R, prefix, IS_CAUSAL, HAS_ROPE, HAS_KEY_MASK, BLOCK_J, PRECISION,
            False,
        )  # fmt: skip
    for first_key in range(whole, end, BLOCK_J):
        acc, best, total = _add_keys(
            q, acc, best, total, k_ptr, v_ptr, rope_ptr, mask_ptr, offs_i, first_key, L, scale,
            stride_l, TILES, d, R, prefix, IS_CAUSAL, HAS_ROPE, HAS_KEY_MASK, BLOCK_J, PRECISION,
            True,
        )  # fmt: skip
    if HAS_KEY_MASK:
        total = tl.where(total == 0.0, 1.0, total)
    y_rows = y_ptr + (image * num_queries + offs_i)[:, None] * (H * d) + head * d
    for t in tl.static_range(len(TILES)):
        offs_d = TILES[t][0] + tl.arange(0, TILES[t][1])
        mask = (offs_i < num_queries)[:, None] & (offs_d < d)[None, :]
        y = convert(acc[t] / total[:, None], y_ptr.dtype.element_ty)
        tl.store(y_rows + offs_d[None, :], y, mask=mask)
    if QUANTIZES:
        arrive(ticket_ptr + image * tiles + item % tiles)


class _Quantizing(NamedTuple):
    """Where a launch quantizes its rows to, and how."""

    rows: Quantized
    symmetric: bool
    space: Workspace | None


def _launch(
    qkv: Tensor,
    operands: AttentionOperands,
    num_queries: int | None,
    config: FloatAttentionConfig | None,
    quantizing: _Quantizing | None = None,
) -> Tensor:
    """The launch that both launchers share; an absent pointer is y, which is then never read."""
    num_heads, causal, rope, key_mask = operands
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    config = config or float_attention_config(L, d, qkv.element_size(), has_rope=rope is not None)
    num_queries = L if num_queries is None else num_queries
    y = torch.empty((B, num_queries, D), dtype=qkv.dtype, device=qkv.device)
    tiles = triton.cdiv(num_queries, config.block_i)
    programs = B * num_heads * tiles
    if not programs:
        return y
    # Launches that quantize nothing must not compile anew for another width
    rows, symmetric, row_k, space = (y, y, y), False, 16, None
    if quantizing is not None:
        rows, symmetric, space = quantizing
        space = space or workspace.of_current_stream(qkv.device)
        assert B * tiles < WORKSPACE_TICKETS, f"float_attention: too many images to quantize: {B}"
        row_k = piece_config(1, D, config.num_warps, 1).block_k
        programs += B * num_queries
    rotated = 0 if rope is None else rope.shape[1]
    live_ptr, per_image, has_live = live_rows.operands(B, y)
    assert per_image <= 1, f"float_attention: B must be the images of live_rows, got {B}"
    launch.start(
        _float_attention_kernel,
        (programs,),
        qkv, y, *rows, y if space is None else space.tickets,
        y if rope is None else rope.contiguous(),
        y if key_mask is None else key_mask.contiguous().view(torch.int8),
        live_ptr, B, L, num_queries, num_heads, rotated, L - rotated, qkv.stride(0), qkv.stride(1),
        math.log2(math.e) / math.sqrt(d),
        d=d, TILES=head_tiles(d), HAS_LIVE=has_live, IS_CAUSAL=causal, HAS_ROPE=rope is not None,
        HAS_KEY_MASK=key_mask is not None, BLOCK_I=config.block_i, BLOCK_J=config.block_j,
        PRECISION="tf32x3" if qkv.dtype is torch.float32 else "ieee",
        QUANTIZES=quantizing is not None, SYMMETRIC=symmetric, ROW_K=row_k,
        IS_ONE_TILE=quantizing is None or D <= row_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def float_attention(
    qkv: Tensor,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    num_queries: int | None = None,
    config: FloatAttentionConfig | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in the type of qkv; see lraee.ops.reference.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D], read in place. float32 is multiplied in three
        TF32 products, about 21 bits.
      num_heads: H, a divisor of D.
      causal: token i sees tokens 0..i only.
      rope: float32 [2, R, d] or None: cos and sin of the last R tokens.
      key_mask: bool [B, L] or None: the tokens that are keys.
      num_queries: how many of the tokens, from the first on, are queries; all L when None.
      config: tiles and warps of a program; chosen by shape when None.
    Returns: [B, num_queries, D] in the type of qkv.
    """
    operands = AttentionOperands(num_heads, causal, rope, key_mask)
    return _launch(qkv, operands, num_queries, config)


def float_attention_quantized(
    qkv: Tensor,
    operands: AttentionOperands,
    *,
    symmetric: bool,
    num_queries: int | None = None,
    config: FloatAttentionConfig | None = None,
    space: Workspace | None = None,
) -> Quantized:
    """quantize_rows of the rows of float_attention in one launch, the same bits.

    Args:
      operands: num_heads to key_mask of float_attention.
      symmetric: as in quantize_rows.
      space: tickets of the launch; that of the current stream when None.
      others: as in float_attention.
    Returns: int8 [M, D] with M = B * num_queries, its scale float32 [M] and zero point int32 [M].
    """
    B, L, D3 = qkv.shape
    rows = empty_quantized(B * (L if num_queries is None else num_queries), D3 // 3, qkv.device)
    _launch(qkv, operands, num_queries, config, _Quantizing(rows, symmetric, space))
    return rows
