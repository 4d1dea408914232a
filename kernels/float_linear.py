"""float_linear for CUDA: float matrix product whose bits depend on neither batch size nor GPU part.

A library picks its algorithm by the number of rows. Here K is cut into segments of SEGMENT_K; each
is summed on tensor cores step by step, and the segments are added in order: by one program, or,
where few tiles would leave the GPU idle, by as many programs as there are segments, the last of
which adds what all have stored. Both ways make the same sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import device, launch, live_rows, workspace
from lraee.kernels.common import INTERPRETED, convert, live_count
from lraee.kernels.configs import WORKSPACE_PARTIALS
from lraee.kernels.epilogue import tile_of
from lraee.kernels.float_configs import (
    SEGMENT_K,
    FloatConfig,
    float_config,
    segments_at_once,
)
from lraee.kernels.int8_linear import gather_partials
from lraee.kernels.workspace import Workspace


@triton.jit
def _segment(x_rows, w_rows, first_k, K, stride_wk, row_mask, col_mask, SEGMENT: tl.constexpr,
             BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x @ w.T over k = first_k .. first_k + SEGMENT - 1."""
    acc = tl.zeros((row_mask.shape[0], col_mask.shape[0]), tl.float32)
    for k in range(first_k, tl.minimum(first_k + SEGMENT, K), BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        k_mask = (cols < K)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=row_mask[:, None] & k_mask, other=0.0)
        w = tl.load(w_rows + cols[None, :] * stride_wk, mask=col_mask[:, None] & k_mask, other=0.0)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _float_linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, partial_ptr, ticket_ptr, live_ptr, M, rows_per_image,
    N, K, stride_xm, stride_wn, stride_wk,
    HAS_LIVE: tl.constexpr, HAS_BIAS: tl.constexpr, SEGMENT: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y: all segments one after the other, or one of SPLITS."""
    tile = tl.program_id(0)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    M = live_count(M, live_ptr, rows_per_image, HAS_LIVE)
    if HAS_LIVE and pid_m * BLOCK_M >= M:
        return
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = offs_m < M, offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SPLITS > 1:
        split = tl.program_id(1)
        y += _segment(x_rows, w_rows, split * SEGMENT, K, stride_wk, row_mask, col_mask,
                      SEGMENT, BLOCK_K, PRECISION)  # fmt: skip
        y, is_last = gather_partials(y, partial_ptr, ticket_ptr, tile, split, SPLITS)
    else:
        for first_k in range(0, K, SEGMENT):
            y += _segment(x_rows, w_rows, first_k, K, stride_wk, row_mask, col_mask,
                          SEGMENT, BLOCK_K, PRECISION)  # fmt: skip
        is_last = True
    if is_last:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n, mask=col_mask, other=0.0)
            y += bias.to(tl.float32)[None, :]
        places = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = row_mask[:, None] & col_mask[None, :]
        tl.store(places, convert(y, y_ptr.dtype.element_ty), mask=mask)


def float_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    config: FloatConfig | None = None,
    splits: int | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """y = x @ w.T + bias, each output summed in one order of its own; see lraee.ops.reference.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      w: the type of x [N, K], any strides.
      bias: any float type [N] or None.
      config: tiling; that of the type and K when None.
      splits: 1, or all segments of K at once; chosen by shape when None; the same bits.
      space: partial sums and tickets; that of the current stream when None.
    Returns: [M, N] in the type of x. float32 is multiplied in three TF32 products, about 21 bits.
    """
    (M, K), N = x.shape, w.shape[0]
    assert w.shape == (N, K) and w.dtype == x.dtype, f"float_linear: w must be {x.dtype} [N, {K}]"
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not M or not N:
        return y
    x = x if K <= 1 or x.stride(1) == 1 else x.contiguous()
    config = config or float_config(K, x.element_size())
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    splits = splits or segments_at_once(config, tiles, K, device.arch(x.device))
    if splits > 1:
        space = space or workspace.of_current_stream(x.device)
        size = tiles * splits * config.block_m * config.block_n
        assert size <= WORKSPACE_PARTIALS, f"float_linear: {size} partial sums are too many"
    live_ptr, rows_per_image, has_live = live_rows.operands(M, x)
    launch.start(
        _float_linear_kernel,
        (tiles, splits),
        x,
        w,
        w if bias is None else bias.contiguous(),
        y,
        x if space is None else space.partials.view(torch.float32),
        x if space is None else space.tickets,
        live_ptr, M, rows_per_image, N, K, x.stride(0), w.stride(0), w.stride(1),
        HAS_LIVE=has_live, HAS_BIAS=bias is not None, SEGMENT=SEGMENT_K, SPLITS=splits,
        PRECISION="tf32x3" if x.dtype is torch.float32 else "ieee",
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=8,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
