"""int8_linear for CUDA: tensor-core int8 product with everything after it fused.

int8_linear_quantized also quantizes the rows of its output in that launch, for the layer that
follows (fc1 for fc2). Each row is read and quantized once, by programs of their own among those of
the tiles (see tickets).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import device, first_use, launch, live_rows, workspace
from lraee.kernels.common import convert
from lraee.kernels.configs import (
    WORKSPACE_TICKETS,
    Config,
    PieceConfig,
    Shape,
    epilogue_name,
    pick,
    piece_config,
)
from lraee.kernels.epilogue import before_residual, tile_of
from lraee.kernels.int8_linear_persistent import int8_linear_persistent
from lraee.kernels.operands import PackedLinear
from lraee.kernels.quantize_rows import Quantized, empty_quantized, quantize_block
from lraee.kernels.tickets import arrive, draw, last_to_arrive, leave, wait_for
from lraee.kernels.workspace import Workspace


@triton.jit
def _store_output(
    acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr, residual_ptr, y_ptr,
    offs_m, offs_n, M, N, stride_rm,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = act((acc - x_zero * w_sum) * (x_scale * w_scale) + bias) * layer_scale + residual."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    y = before_residual(
        acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr, offs_n, N,
        HAS_ZERO, HAS_BIAS, HAS_LAYER_SCALE, ACTIVATION,
    )  # fmt: skip
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_rm + offs_n[None, :], mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(y_ptr + rows * N + offs_n[None, :], convert(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_partials(acc, partial_ptr, ticket_ptr, tile, split, SPLIT_K: tl.constexpr):
    """Stores this program's partial sums; in the last program of the tile, returns their total,
    added in the order of the parts.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    base = partial_ptr + tile * SPLIT_K * SIZE
    tl.store(base + split * SIZE + offs, acc, cache_modifier=".cg")
    is_last = last_to_arrive(ticket_ptr + tile, SPLIT_K)
    if is_last:
        acc = tl.zeros_like(acc)
        for part in range(SPLIT_K):
            acc += tl.load(base + part * SIZE + offs, cache_modifier=".cg")
    return acc, is_last


@triton.jit
def _quantize_piece(
    y_ptr, q_ptr, q_scale_ptr, q_zero_ptr, piece, M, N,
    SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr, PIECE_ROWS: tl.constexpr,
    PIECE_K: tl.constexpr,
):  # fmt: skip
    """quantize_block of the next PIECE_ROWS rows of y."""
    rows = piece * PIECE_ROWS + tl.arange(0, PIECE_ROWS)
    quantize_block(
        y_ptr, q_ptr, q_scale_ptr, q_zero_ptr, rows, rows < M, N, N,
        SYMMETRIC, IS_ONE_TILE, PIECE_K, ".cg",
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _int8_linear_kernel(
    x_ptr, x_scale_ptr, x_zero_ptr, w_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
    residual_ptr, y_ptr, q_ptr, q_scale_ptr, q_zero_ptr, partial_ptr, ticket_ptr,
    M, N, K, stride_xm, stride_rm, live_ptr, rows_per_image,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    QUANTIZES: tl.constexpr, SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    PIECE_ROWS: tl.constexpr, PIECE_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of y over one of SPLIT_K parts of K.

    The parts of a split tile are int32, so that their sum does not depend on the split; the last
    program to arrive adds them and stores y.
    QUANTIZES: the rows of y [M, N] are quantized into q, q_scale, q_zero, PIECE_ROWS of them by a
    program, after the tiles of their row block.
    HAS_LIVE: only the rows of the first live_ptr[0] images are read and written. Tiles are numbered
    as if all were; those without such a row end at once, and nothing waits for them.
    """
    item = tl.program_id(0)
    live = M
    if HAS_LIVE:
        live = tl.minimum(tl.load(live_ptr) * rows_per_image, M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    programs = tl.cdiv(M, BLOCK_M) * tiles_n * SPLIT_K
    row_ticket_ptr = ticket_ptr + 1
    if QUANTIZES:
        PIECES: tl.constexpr = BLOCK_M // PIECE_ROWS
        item = draw(ticket_ptr, tl.num_programs(0))
        ticket_ptr += 1 + tl.cdiv(M, BLOCK_M)
        if item >= programs:
            pieces = tl.num_programs(0) - programs
            piece = item - programs
            block = piece // PIECES
            if HAS_LIVE:
                if block * BLOCK_M >= live:
                    return
            row_ticket_ptr += block
            of_block = tl.minimum(pieces - block * PIECES, PIECES)
            wait_for(row_ticket_ptr, tiles_n)
            _quantize_piece(
                y_ptr, q_ptr, q_scale_ptr, q_zero_ptr, piece, live, N,
                SYMMETRIC, IS_ONE_TILE, PIECE_ROWS, PIECE_K,
            )  # fmt: skip
            leave(row_ticket_ptr, tiles_n + of_block)
            return
    tiles = programs // SPLIT_K
    tile = item % tiles
    split = item // tiles
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if HAS_LIVE:
        if pid_m * BLOCK_M >= live:
            return
    row_ticket_ptr += pid_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row_mask = offs_m < live
    col_mask = offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + offs_k
        x_mask, w_mask = row_mask[:, None], col_mask[:, None]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (cols < K)[None, :], w_mask & (cols < K)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=x_mask, other=0)
        w = tl.load(w_rows + cols[None, :], mask=w_mask, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)

    if SPLIT_K > 1:
        acc, is_last = gather_partials(acc, partial_ptr, ticket_ptr, tile, split, SPLIT_K)
    else:
        is_last = True
    if is_last:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=row_mask, other=0.0)
        x_zero = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_ZERO:
            x_zero = tl.load(x_zero_ptr + offs_m, mask=row_mask, other=0)
        _store_output(
            acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
            residual_ptr, y_ptr, offs_m, offs_n, live, N, stride_rm,
            HAS_ZERO, HAS_BIAS, HAS_LAYER_SCALE, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        if QUANTIZES:
            arrive(row_ticket_ptr)


def _by_family(
    x: tuple[Tensor, Tensor, Tensor | None],
    linear: PackedLinear,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """The launch of a config that is not the simple kernel's."""
    options: dict[str, Any] = {"config": config, "activation": activation, "out_dtype": out_dtype}
    y: Tensor
    if config.family == "persistent":
        y = int8_linear_persistent(*x, linear, residual=residual, **options)
        return y
    assert residual is None, "int8_linear: gluon adds no residual"
    # Not every Triton has Gluon
    from lraee.kernels.int8_linear_gluon import int8_linear_gluon

    y = int8_linear_gluon(*x, linear, **options)
    return y


class _Quantizing(NamedTuple):
    """Where a launch quantizes the rows of y to, and how."""

    rows: Quantized
    symmetric: bool


def _launch(
    x: tuple[Tensor, Tensor, Tensor | None],
    linear: PackedLinear,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    config: Config | None,
    space: Workspace | None,
    quantizing: _Quantizing | None = None,
) -> Tensor:
    """The launch that both launchers share; an absent pointer is w_scale, which is never read."""
    x_q, x_scale, x_zero = x
    (M, K), N = x_q.shape, linear.N
    w, w_scale, w_sum, bias, layer_scale = linear
    assert w.shape == (N, K), f"int8_linear: w must have the CUDA layout [{N}, {K}], got {w.shape}"
    if not M or not N:
        return torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    x_q = x_q if K <= 1 or x_q.stride(1) == 1 else x_q.contiguous()
    if residual is not None and N > 1 and residual.stride(1) != 1:
        residual = residual.contiguous()
    if (
        config is None
        and x_q.is_cuda
        and device.arch(x_q.device).capability == first_use.CAPABILITY
    ):
        first_use.begin(x_q.device, str(device.gpu_name(x_q.device)))
    config = config or pick(
        Shape(M, N, K), device.arch(x_q.device),
        epilogue_name(activation, has_layer_scale=layer_scale is not None,
                      has_residual=residual is not None, quantizes=quantizing is not None,
                      is_float32=out_dtype is torch.float32),
        device.gpu_name(x_q.device),
    )  # fmt: skip
    if config.family != "simple":
        assert quantizing is None, f"int8_linear: {config.family} quantizes no rows"
        return _by_family((x_q, x_scale, x_zero), linear, residual, activation, out_dtype, config)
    if space is None and (config.split_k > 1 or quantizing is not None):
        space = workspace.of_current_stream(x_q.device)
    row_blocks = triton.cdiv(M, config.block_m)
    programs = row_blocks * triton.cdiv(N, config.block_n) * config.split_k
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    absent, live = w_scale, live_rows.current()
    # Launches that quantize nothing must not compile anew for another piece or width
    q: Quantized = (absent, absent, absent)
    symmetric, piece, is_one_tile = False, PieceConfig(1, 16), True
    if quantizing is not None:
        q, symmetric = quantizing
        piece = piece_config(M, N, config.num_warps, config.block_m)
        is_one_tile = N <= piece.block_k
        assert row_blocks < WORKSPACE_TICKETS, f"int8_linear: too many rows to quantize: {M}"
        programs += triton.cdiv(M, piece.rows)
    operands = (x_scale, x_zero, w, w_scale, w_sum, bias, layer_scale)
    launch.start(
        _int8_linear_kernel,
        (programs,),
        x_q,
        *(absent if operand is None else operand.contiguous() for operand in operands),
        absent if residual is None else residual,
        y,
        *q,
        absent if space is None else space.partials,
        absent if space is None else space.tickets,
        M, N, K, x_q.stride(0), 0 if residual is None else residual.stride(0),
        absent if live is None else live.images,
        0 if live is None else live.rows_per_image(M), HAS_LIVE=live is not None,
        HAS_ZERO=x_zero is not None,
        HAS_BIAS=bias is not None, HAS_LAYER_SCALE=layer_scale is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, EVEN_K=K % config.block_k == 0,
        QUANTIZES=quantizing is not None, SYMMETRIC=symmetric, IS_ONE_TILE=is_one_tile,
        PIECE_ROWS=piece.rows, PIECE_K=piece.block_k, SPLIT_K=config.split_k,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q, x_scale, x_zero, linear, residual, activation, out_dtype: as in
        lraee.ops.reference.int8_linear; w is int8 [N, K].
      config: tiling; chosen by configs.pick when None.
      space: partial sums and tickets; that of the current stream when None.
    Returns: out_dtype [M, N].
    Accumulates in int32, exact for K <= 65_793.
    """
    return _launch((x_q, x_scale, x_zero), linear, residual, activation, out_dtype, config, space)


def int8_linear_quantized(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    symmetric: bool,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
    space: Workspace | None = None,
) -> Quantized:
    """quantize_rows(int8_linear(x_q, …), symmetric) in one launch, the same bits.

    Args:
      symmetric: as in quantize_rows.
      others: as in int8_linear; out_dtype is what the rows are before they are quantized.
    Returns: int8 [M, N], its scale float32 [M] and zero point int32 [M].
    """
    rows = empty_quantized(x_q.shape[0], linear.N, x_q.device)
    quantizing = _Quantizing(rows, symmetric)
    x = (x_q, x_scale, x_zero)
    _launch(x, linear, residual, activation, out_dtype, config, space, quantizing)
    return rows
