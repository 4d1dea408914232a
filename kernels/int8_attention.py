"""int8_attention for CUDA: int8 scores, float probabilities, one launch.

int8_attention_quantized gives its rows quantized, for the projection that follows, in that launch.

Q, K and V are read where the projection left them (qkv [B, L, 3 D], any token stride), and gone
through once, 64 keys at a time. Holding the scores of all keys in registers, as far as 320 tokens,
left room for 8 warps an SM and was ten times slower than torch's attention at 197 tokens (H200).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, workspace
from lraee.kernels.common import (
    INFINITY,
    INTERPRETED,
    convert,
    quantize_tile,
    quantizer,
    tile_range,
)
from lraee.kernels.configs import (
    WORKSPACE_TICKETS,
    AttentionConfig,
    PieceConfig,
    attention_config,
    piece_config,
)
from lraee.kernels.operands import AttentionOperands
from lraee.kernels.quantize_rows import Quantized, empty_quantized, quantize_block
from lraee.kernels.tickets import arrive, draw, leave, wait_for
from lraee.kernels.workspace import Workspace

BLOCK_J = tl.constexpr(64)
"""Keys of one tile."""


@triton.jit
def _load_rows(ptr, rope_ptr, offs_l, mask, stride_l, offs_d, d, R, prefix, HAS_ROPE: tl.constexpr):
    """Rows of one head in float32, rotated from token `prefix` on where HAS_ROPE: see reference."""
    rows = ptr + offs_l[:, None] * stride_l
    x = tl.load(rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_ROPE:
        half = d // 2
        is_low = (offs_d < half)[None, :]
        offs_other = tl.where(offs_d < half, offs_d + half, offs_d - half)
        other = tl.load(rows + offs_other[None, :], mask=mask, other=0.0).to(tl.float32)
        is_turned = mask & (offs_l >= prefix)[:, None]
        cos_rows = rope_ptr + (offs_l - prefix)[:, None] * d + offs_d[None, :]
        cos = tl.load(cos_rows, mask=is_turned, other=1.0)
        sin = tl.load(cos_rows + R * d, mask=is_turned, other=0.0)
        turned = x * cos + tl.where(is_low, -other, other) * sin
        x = tl.where(is_turned, turned, x)
    return x


@triton.jit
def _is_key(mask_ptr, offs_l, L, HAS_KEY_MASK: tl.constexpr):
    """Whether tokens are keys."""
    is_key = offs_l < L
    if HAS_KEY_MASK:
        is_key = is_key & (tl.load(mask_ptr + offs_l, mask=is_key, other=0) != 0)
    return is_key


@triton.jit
def _mean_key(
    k_ptr, rope_ptr, mask_ptr, L, stride_l, offs_d, d, R, prefix, HAS_ROPE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mean of the keys of one head over tokens, summed in token order, UNROLL loads in flight."""
    BLOCK_D: tl.constexpr = offs_d.shape[0]
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.cast(L, tl.float32)
    if HAS_KEY_MASK:
        count = tl.cast(0.0, tl.float32)
    half = d // 2
    offs_other = tl.where(offs_d < half, offs_d + half, offs_d - half)
    for first in range(0, L, UNROLL):
        for u in tl.static_range(UNROLL):
            token = first + u
            is_key = token < L
            if HAS_KEY_MASK:
                is_key = is_key & (tl.load(mask_ptr + token, mask=is_key, other=0) != 0)
                count += is_key.to(tl.float32)
            mask = (offs_d < d) & is_key
            row_ptr = k_ptr + token * stride_l
            k = tl.load(row_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
            if HAS_ROPE:
                other = tl.load(row_ptr + offs_other, mask=mask, other=0.0).to(tl.float32)
                is_turned = mask & (token >= prefix)
                cos_ptr = rope_ptr + (token - prefix) * d + offs_d
                cos = tl.load(cos_ptr, mask=is_turned, other=1.0)
                sin = tl.load(cos_ptr + R * d, mask=is_turned, other=0.0)
                turned = k * cos + tl.where(offs_d < half, -other, other) * sin
                k = tl.where(is_turned, turned, k)
            total += k
    if HAS_KEY_MASK:
        count = tl.maximum(count, 1.0)
    return tl.div_rn(total, count)


@triton.jit
def _quantize_heads(
    ptr, rope_ptr, mean, offs_l, is_row, stride_l, offs_d, d, R, prefix, HAS_ROPE: tl.constexpr
):
    """int8 rows of one head, centred on mean, and their scales."""
    mask = is_row[:, None] & (offs_d < d)[None, :]
    x = _load_rows(ptr, rope_ptr, offs_l, mask, stride_l, offs_d, d, R, prefix, HAS_ROPE)
    x = tl.where(mask, x - mean[None, :], 0.0)
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
def _attend(q_q, q_step, k_ptr, v_ptr, rope_ptr, mask_ptr, k_mean, offs_i, L, stride_l, offs_d, d,
            R, prefix, IS_CAUSAL: tl.constexpr, HAS_ROPE: tl.constexpr,
            HAS_KEY_MASK: tl.constexpr):  # fmt: skip
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
        k_q, k_scale = _quantize_heads(
            k_ptr, rope_ptr, k_mean, offs_j, is_key, stride_l, offs_d, d, R, prefix, HAS_ROPE
        )
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


@triton.jit
def _quantize_piece(
    y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, piece, num_queries, H, d,
    SYMMETRIC: tl.constexpr, BLOCK_I: tl.constexpr, PIECE_ROWS: tl.constexpr,
    PIECE_K: tl.constexpr, IS_ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Quantizes PIECE_ROWS rows of one tile of queries when all of its heads are stored."""
    PIECES: tl.constexpr = BLOCK_I // PIECE_ROWS
    of_image = tl.cdiv(num_queries, PIECE_ROWS)
    image = piece // of_image
    tile = piece % of_image // PIECES
    ticket_ptr += image * tl.cdiv(num_queries, BLOCK_I) + tile
    offs_i = piece % of_image * PIECE_ROWS + tl.arange(0, PIECE_ROWS)
    wait_for(ticket_ptr, H)
    quantize_block(
        y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, image * num_queries + offs_i,
        offs_i < num_queries, H * d, H * d, SYMMETRIC, IS_ONE_TILE, PIECE_K, ".cg",
    )  # fmt: skip
    leave(ticket_ptr, H + tl.minimum(of_image - tile * PIECES, PIECES))


@triton.jit(do_not_specialize=["B", "L", "num_queries"])
def _int8_attention_kernel(
    qkv_ptr, y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, rope_ptr, mask_ptr,
    B, L, num_queries, H, d, R, prefix, stride_b, stride_l, root,
    IS_CAUSAL: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, QUANTIZES: tl.constexpr, SYMMETRIC: tl.constexpr,
    PIECE_ROWS: tl.constexpr, PIECE_K: tl.constexpr, IS_ONE_TILE: tl.constexpr,
):  # fmt: skip
    """y[b, i, h] = softmax(logit[i]) @ v for BLOCK_I of the queries i < num_queries of one head.

    k is centred on its mean over tokens; logit_ij = s_ij * ((q_scale_i * root) * k_scale_j) with
    s the int8 product and root = d^-1/2.
    QUANTIZES: more programs, after those of the heads, quantize PIECE_ROWS rows of y each, once all
    heads of these queries are done (see tickets).
    """
    item = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_I)
    if QUANTIZES:
        item = draw(ticket_ptr, tl.num_programs(0))
        ticket_ptr += 1
        if item >= B * H * tiles:
            _quantize_piece(
                y_ptr, y_q_ptr, y_scale_ptr, y_zero_ptr, ticket_ptr, item - B * H * tiles,
                num_queries, H, d, SYMMETRIC, BLOCK_I, PIECE_ROWS, PIECE_K, IS_ONE_TILE,
            )  # fmt: skip
            return
    head = (item // tiles) % H
    image = (item // tiles // H).to(tl.int64)
    offs_i = (item % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + image * stride_b + head * d
    k_ptr = q_ptr + H * d
    v_ptr = k_ptr + H * d
    mask_ptr += image * L
    no_mean = tl.zeros((BLOCK_D,), tl.float32)
    q_q, q_scale = _quantize_heads(
        q_ptr, rope_ptr, no_mean, offs_i, offs_i < L, stride_l, offs_d, d, R, prefix, HAS_ROPE
    )
    q_step = q_scale * root
    k_mean = _mean_key(
        k_ptr, rope_ptr, mask_ptr, L, stride_l, offs_d, d, R, prefix, HAS_ROPE, HAS_KEY_MASK,
        UNROLL,
    )  # fmt: skip
    y = _attend(
        q_q, q_step, k_ptr, v_ptr, rope_ptr, mask_ptr, k_mean, offs_i, L, stride_l, offs_d, d, R,
        prefix, IS_CAUSAL, HAS_ROPE, HAS_KEY_MASK,
    )  # fmt: skip
    y_rows = y_ptr + (image * num_queries + offs_i)[:, None] * (H * d) + head * d
    mask = (offs_i < num_queries)[:, None] & (offs_d < d)[None, :]
    tl.store(y_rows + offs_d[None, :], convert(y, y_ptr.dtype.element_ty), mask=mask)
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
    config: AttentionConfig | None,
    quantizing: _Quantizing | None = None,
) -> Tensor:
    """The launch that both launchers share; an absent pointer is y, which is then never read."""
    num_heads, causal, rope, key_mask = operands
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    config = config or attention_config(L, d, causal, has_mask=key_mask is not None)
    if rope is not None and qkv.is_cuda:
        raise NotImplementedError(
            "int8_attention: rope must be None on a GPU, got rotary positions: the kernel spills or"
            " does not fit on most parts; use float_attention"
        )
    num_queries = L if num_queries is None else num_queries
    y = torch.empty((B, num_queries, D), dtype=qkv.dtype, device=qkv.device)
    tiles = triton.cdiv(num_queries, config.block_i)
    programs = B * num_heads * tiles
    if not programs:
        return y
    piece, rows, symmetric, space = PieceConfig(1, 16), (y, y, y), False, None
    if quantizing is not None:
        rows, symmetric, space = quantizing
        space = space or workspace.of_current_stream(qkv.device)
        assert B * tiles < WORKSPACE_TICKETS, f"int8_attention: too many images to quantize: {B}"
        group = min(num_queries, config.block_i)
        piece = piece_config(B * num_queries, D, config.num_warps, group)
        programs += B * triton.cdiv(num_queries, piece.rows)
    rotated = 0 if rope is None else rope.shape[1]
    launch.start(
        _int8_attention_kernel,
        (programs,),
        qkv, y, *rows, y if space is None else space.tickets,
        y if rope is None else rope.contiguous(),
        y if key_mask is None else key_mask.contiguous().view(torch.int8),
        B, L, num_queries, num_heads, d, rotated, L - rotated, qkv.stride(0), qkv.stride(1),
        1.0 / math.sqrt(d),
        IS_CAUSAL=causal, HAS_ROPE=rope is not None, HAS_KEY_MASK=key_mask is not None,
        BLOCK_I=config.block_i, BLOCK_D=max(32, triton.next_power_of_2(d)),
        UNROLL=config.unroll, QUANTIZES=quantizing is not None, SYMMETRIC=symmetric,
        PIECE_ROWS=piece.rows, PIECE_K=piece.block_k, IS_ONE_TILE=D <= piece.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


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
      rope: float32 [2, R, d] or None: cos and sin of the last R tokens.
      key_mask: bool [B, L] or None: the tokens that are keys. Masked tokens behind all keys change
        no bit; before or between them they change the tiles in which probabilities are added.
      num_queries: how many of the tokens, from the first on, are queries; all L when None.
      config: queries and warps of a program; chosen by shape when None.
    Returns: [B, num_queries, D] in the type of qkv.
    """
    operands = AttentionOperands(num_heads, causal, rope, key_mask)
    return _launch(qkv, operands, num_queries, config)


def int8_attention_quantized(
    qkv: Tensor,
    operands: AttentionOperands,
    *,
    symmetric: bool,
    num_queries: int | None = None,
    config: AttentionConfig | None = None,
    space: Workspace | None = None,
) -> Quantized:
    """quantize_rows of the rows of int8_attention in one launch, the same bits.

    Args:
      operands: num_heads to key_mask of int8_attention.
      symmetric: as in quantize_rows.
      space: partial sums and tickets of the launch; that of the current stream when None.
      others: as in int8_attention.
    Returns: int8 [M, D] with M = B * num_queries, its scale float32 [M] and zero point int32 [M].
    """
    B, L, D3 = qkv.shape
    rows = empty_quantized(B * (L if num_queries is None else num_queries), D3 // 3, qkv.device)
    _launch(qkv, operands, num_queries, config, _Quantizing(rows, symmetric, space))
    return rows
