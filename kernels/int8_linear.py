"""int8_linear for CUDA: tensor-core int8 product with everything after it fused.

Also int8_linear_from_float, whose programs first quantize the float rows they share, so that a
layer whose input has no other reader (fc2) needs no launch of its own to quantize it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import device, launch, workspace
from lraee.kernels.common import activate, convert
from lraee.kernels.configs import (
    ROW_BLOCK_TICKETS,
    WORKSPACE_TICKETS,
    Config,
    Shape,
    pick,
    piece_rows,
)
from lraee.kernels.meeting import last_to_arrive, quantize_together
from lraee.kernels.quantize_rows import empty_quantized
from lraee.kernels.workspace import Workspace

PIECE_VALUES = {"row": 8, "rows": 4}
"""Values that a thread of int8_linear_from_float quantizes at once, of one row or of several.

With others some configs spill 8 bytes around a division (sm_80, 86, 89 or 100; Triton 3.8).
"""
_ROW_BLOCK_TICKETS = tl.constexpr(ROW_BLOCK_TICKETS)


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of program pid: GROUP_M rows of tiles at a time, so that neighbours share w in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows


@triton.jit
def _store_output(
    acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr, residual_ptr, y_ptr,
    offs_m, offs_n, M, N, stride_rm,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = act((acc - x_zero * w_sum) * (x_scale * w_scale) + bias) * layer_scale + residual."""
    col_mask = offs_n < N
    mask = (offs_m < M)[:, None] & col_mask[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    if HAS_ZERO:
        w_sum = tl.load(w_sum_ptr + offs_n, mask=col_mask, other=0)
        acc -= x_zero[:, None] * w_sum[None, :]
    w_scale = tl.load(w_scale_ptr + offs_n, mask=col_mask, other=0.0)
    y = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=col_mask, other=0.0)[None, :]
    y = activate(y, ACTIVATION)
    if HAS_LAYER_SCALE:
        layer_scale = tl.load(layer_scale_ptr + offs_n, mask=col_mask, other=0.0)
        y *= layer_scale.to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_rm + offs_n[None, :], mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + rows * N + offs_n[None, :], convert(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_partials(acc, partial_ptr, ticket_ptr, tile, SPLIT_K: tl.constexpr):
    """Stores this program's partial sums; in the last program of the tile, returns their total,
    added in the order of the parts.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    base = partial_ptr + tile * SPLIT_K * SIZE
    tl.store(base + tl.program_id(1) * SIZE + offs, acc, cache_modifier=".cg")
    is_last = last_to_arrive(ticket_ptr + tile, SPLIT_K)
    if is_last:
        acc = tl.zeros_like(acc)
        for split in range(SPLIT_K):
            acc += tl.load(base + split * SIZE + offs, cache_modifier=".cg")
    return acc, is_last


@triton.jit(do_not_specialize=["M"])
def _int8_linear_kernel(
    x_ptr, x_scale_ptr, x_zero_ptr, w_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
    residual_ptr, y_ptr, float_ptr, partial_ptr, ticket_ptr, M, N, K,
    stride_xm, stride_rm, stride_fm,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    FROM_FLOAT: tl.constexpr, SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    PIECE_ROWS: tl.constexpr, PIECE_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of y over one of SPLIT_K parts of K.

    FROM_FLOAT: the programs of a row block first quantize its float rows into x, x_scale, x_zero
    (quantize_together). The parts of a split tile are int32, so that their sum does not depend on
    the split; the last program to arrive adds them and stores y.
    """
    tile = tl.program_id(0)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row_mask = offs_m < M
    col_mask = offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * K
    if FROM_FLOAT:
        first_row = pid_m * BLOCK_M
        end_row = tl.minimum(first_row + BLOCK_M, M)
        quantize_together(
            float_ptr, x_ptr, x_scale_ptr, x_zero_ptr, first_row, end_row, K, stride_fm,
            ticket_ptr + _ROW_BLOCK_TICKETS * pid_m, tl.cdiv(N, BLOCK_N) * SPLIT_K,
            SYMMETRIC, IS_ONE_TILE, PIECE_ROWS, PIECE_K,
        )  # fmt: skip
        ticket_ptr += _ROW_BLOCK_TICKETS * tl.cdiv(M, BLOCK_M)

    CACHE: tl.constexpr = ".cg" if FROM_FLOAT else ""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = tl.program_id(1) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + offs_k
        x_mask, w_mask = row_mask[:, None], col_mask[:, None]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (cols < K)[None, :], w_mask & (cols < K)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=x_mask, other=0, cache_modifier=CACHE)
        w = tl.load(w_rows + cols[None, :], mask=w_mask, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)

    if SPLIT_K > 1:
        acc, is_last = gather_partials(acc, partial_ptr, ticket_ptr, tile, SPLIT_K)
    else:
        is_last = True
    if is_last:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=row_mask, other=0.0, cache_modifier=CACHE)
        x_zero = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_ZERO:
            x_zero = tl.load(x_zero_ptr + offs_m, mask=row_mask, other=0, cache_modifier=CACHE)
        _store_output(
            acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
            residual_ptr, y_ptr, offs_m, offs_n, M, N, stride_rm,
            HAS_ZERO, HAS_BIAS, HAS_LAYER_SCALE, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


def _launch(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    config: Config,
    space: Workspace | None,
    x: Tensor | None = None,
    is_symmetric: bool = False,
) -> Tensor:
    """The launch that both doors share; absent pointers are replaced by w_scale and never read."""
    (M, K), N = x_q.shape, w_scale.shape[0]
    assert w.shape == (N, K), f"int8_linear: w must have the CUDA layout [{N}, {K}], got {w.shape}"
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    if not M or not N:
        return y
    if residual is not None and N > 1 and residual.stride(1) != 1:
        residual = residual.contiguous()
    if space is None and (config.split_k > 1 or x is not None):
        space = workspace.of_current_stream(x_q.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    rows = piece_rows(N, config) if x is not None else 0
    most = PIECE_VALUES["row" if rows == 1 else "rows"] * 32 * config.num_warps
    piece_k = min(triton.next_power_of_2(max(K, 16)), most // rows) if rows else 0
    absent = w_scale
    launch.start(
        _int8_linear_kernel,
        (tiles, config.split_k),
        x_q,
        x_scale.contiguous(),
        absent if x_zero is None else x_zero.contiguous(),
        w.contiguous(),
        w_scale.contiguous(),
        w_sum.contiguous(),
        absent if bias is None else bias.contiguous(),
        absent if layer_scale is None else layer_scale.contiguous(),
        absent if residual is None else residual,
        y,
        absent if x is None else x,
        absent if space is None else space.partials,
        absent if space is None else space.tickets,
        M, N, K, x_q.stride(0), 0 if residual is None else residual.stride(0),
        0 if x is None else x.stride(0),
        HAS_ZERO=x_zero is not None and not is_symmetric, HAS_BIAS=bias is not None,
        HAS_LAYER_SCALE=layer_scale is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation, EVEN_K=K % config.block_k == 0,
        FROM_FLOAT=x is not None, SYMMETRIC=is_symmetric, IS_ONE_TILE=K <= piece_k,
        PIECE_ROWS=rows, PIECE_K=piece_k, SPLIT_K=config.split_k,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def _pick(x: Tensor, w_scale: Tensor) -> Config:
    M, K = x.shape
    return pick(Shape(M, w_scale.shape[0], K), device.arch(x.device))


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, layer_scale, activation, out_dtype:
        as in lraee.reference.int8_linear; w is int8 [N, K].
      config: tiling; chosen by configs.pick when None.
      space: where split-K programs meet; that of the current stream when None.
    Returns: out_dtype [M, N].
    Accumulates in int32, exact for K <= 65_793.
    """
    x_q = x_q if x_q.shape[1] <= 1 or x_q.stride(1) == 1 else x_q.contiguous()
    config = config or _pick(x_q, w_scale)
    return _launch(
        x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, layer_scale, activation,
        out_dtype, config, space,
    )  # fmt: skip


def int8_linear_from_float(
    x: Tensor,
    symmetric: bool,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """int8_linear(*quantize_rows(x, symmetric), w, …) in one launch, the same bits.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      symmetric: as in quantize_rows.
      others: as in int8_linear.
    Returns: out_dtype [M, N].
    The programs of a row block quantize its rows together before they multiply: each row is read
    and quantized once, as by quantize_rows (kernels/meeting.py).
    """
    M, K = x.shape
    x = x if K <= 1 or x.stride(1) == 1 else x.contiguous()
    config = config or _pick(x, w_scale)
    row_blocks = triton.cdiv(M, config.block_m)
    most = WORKSPACE_TICKETS // ROW_BLOCK_TICKETS
    assert row_blocks <= most, f"int8_linear_from_float: at most {most * config.block_m} rows"
    x_q, x_scale, x_zero = empty_quantized(M, K, x.device)
    return _launch(
        x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, layer_scale, activation,
        out_dtype, config, space, x, symmetric,
    )  # fmt: skip
