"""quantize_rows for CUDA: one program owns a few rows, held in registers when they fit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, live_rows
from lraee.kernels.common import live_count, quantize_tile, quantizer, tile_range
from lraee.kernels.configs import RowConfig, row_config

Quantized = tuple[Tensor, Tensor, Tensor]


@triton.jit
def quantize_block(
    x_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, offs_m, row_mask, K, stride_xm,
    SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """x_q[m] = clamp(round(x[m] / scale_m) + zero_m) of the rows offs_m where row_mask.

    A row of at most BLOCK_K values (IS_ONE_TILE) is read once; a longer one twice: range, values.
    CACHE: how x is read, ".cg" where another program of the launch stored it.
    """
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    x_q_rows = x_q_ptr + offs_m.to(tl.int64)[:, None] * K
    mask = row_mask[:, None] & (offs_k[None, :] < K)
    x = tl.load(x_rows + offs_k[None, :], mask=mask, other=0.0, cache_modifier=CACHE)
    x = x.to(tl.float32)
    lo, hi = tile_range(x)
    if not IS_ONE_TILE:
        for k in range(BLOCK_K, K, BLOCK_K):
            mask = row_mask[:, None] & (k + offs_k[None, :] < K)
            x = tl.load(x_rows + k + offs_k[None, :], mask=mask, other=0.0, cache_modifier=CACHE)
            x = x.to(tl.float32)
            tile_lo, tile_hi = tile_range(x)
            lo, hi = tl.minimum(lo, tile_lo), tl.maximum(hi, tile_hi)
    scale, zero, is_valid = quantizer(lo, hi, SYMMETRIC)
    tl.store(x_scale_ptr + offs_m, scale, mask=row_mask)
    tl.store(x_zero_ptr + offs_m, zero.to(tl.int32), mask=row_mask)
    if IS_ONE_TILE:
        x_q = quantize_tile(x, scale, zero, is_valid, SYMMETRIC)
        tl.store(x_q_rows + offs_k[None, :], x_q, mask=mask)
    else:
        for k in range(0, K, BLOCK_K):
            mask = row_mask[:, None] & (k + offs_k[None, :] < K)
            x = tl.load(x_rows + k + offs_k[None, :], mask=mask, other=0.0, cache_modifier=CACHE)
            x = x.to(tl.float32)
            x_q = quantize_tile(x, scale, zero, is_valid, SYMMETRIC)
            tl.store(x_q_rows + k + offs_k[None, :], x_q, mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _quantize_rows_kernel(
    x_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, live_ptr, M, rows_per_image, K, stride_xm,
    HAS_LIVE: tl.constexpr, SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """quantize_block of BLOCK_M rows."""
    M = live_count(M, live_ptr, rows_per_image, HAS_LIVE)
    if HAS_LIVE and tl.program_id(0) * BLOCK_M >= M:
        return
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    quantize_block(
        x_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, offs_m, offs_m < M, K, stride_xm,
        SYMMETRIC, IS_ONE_TILE, BLOCK_K, "",
    )  # fmt: skip


def empty_quantized(M: int, K: int, device: torch.device) -> Quantized:
    """Memory for M quantized rows of K values: x_q, x_scale, x_zero."""
    return (
        torch.empty((M, K), dtype=torch.int8, device=device),
        torch.empty(M, dtype=torch.float32, device=device),
        torch.empty(M, dtype=torch.int32, device=device),
    )


def quantize_rows(x: Tensor, symmetric: bool, *, config: RowConfig | None = None) -> Quantized:
    """x ~ (x_q - x_zero) * x_scale with one scale and zero point per row; see lraee.ops.reference.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      symmetric: x_zero = 0 and steps -127..127.
      config: rows and warps of a program; chosen by shape when None.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    """
    M, K = x.shape
    x = x if K <= 1 or x.stride(1) == 1 else x.contiguous()
    config = config or row_config(M, K)
    x_q, x_scale, x_zero = empty_quantized(M, K, x.device)
    if M:
        live_ptr, rows_per_image, has_live = live_rows.operands(M, x)
        BLOCK_K = min(triton.next_power_of_2(max(K, 16)), 4096)
        launch.start(
            _quantize_rows_kernel,
            (triton.cdiv(M, config.block_m),),
            x, x_q, x_scale, x_zero, live_ptr, M, rows_per_image, K, x.stride(0),
            HAS_LIVE=has_live, SYMMETRIC=symmetric, IS_ONE_TILE=K <= BLOCK_K,
            BLOCK_M=config.block_m, BLOCK_K=BLOCK_K,
            num_warps=config.num_warps,
        )  # fmt: skip
    return x_q, x_scale, x_zero
