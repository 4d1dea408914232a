"""int8_linear for CUDA: tensor-core int8 product with everything after it fused.

Also int8_linear_from_float, which quantizes its float rows while it loads them, so that a layer
whose input has no other reader (fc2) needs no pass of its own to quantize it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import device, launch, workspace
from lraee.kernels.common import (
    activate,
    convert,
    last_to_arrive,
    quantize_tile,
    quantizer,
    value_range,
)
from lraee.kernels.configs import Config, Shape, pick
from lraee.kernels.workspace import Workspace


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
def row_quantizer(x_rows, row_mask, K, SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip  # noqa: E501
    """Quantizer of BLOCK_M float rows, from one reading of them."""
    offs_k = tl.arange(0, BLOCK_K)
    lo = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    hi = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = row_mask[:, None] & (k + offs_k[None, :] < K)
        x = tl.load(x_rows + k + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        tile_lo, tile_hi = value_range(x)
        lo, hi = tl.minimum(lo, tile_lo), tl.maximum(hi, tile_hi)
    return quantizer(tl.min(lo, axis=1), tl.max(hi, axis=1), SYMMETRIC)


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
    residual_ptr, y_ptr, partial_ptr, ticket_ptr, M, N, K, stride_xm, stride_rm,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, IS_FLOAT: tl.constexpr,
    EVEN_K: tl.constexpr, SYMMETRIC: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of y over one of SPLIT_K parts of K.

    x is int8 with its scales, or float (IS_FLOAT): then the program first reads its rows for their
    quantizers and quantizes each tile as it loads it. The parts of a split tile are int32, so that
    their sum does not depend on the split; the last program to arrive adds them and stores y.
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
    if IS_FLOAT:
        scale, zero, is_valid = row_quantizer(x_rows, row_mask, K, SYMMETRIC, BLOCK_M, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = tl.program_id(1) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + offs_k
        if EVEN_K:
            x = tl.load(x_rows + cols[None, :], mask=row_mask[:, None], other=0)
            w = tl.load(w_rows + cols[None, :], mask=col_mask[:, None], other=0)
        else:
            k_mask = (cols < K)[None, :]
            x = tl.load(x_rows + cols[None, :], mask=row_mask[:, None] & k_mask, other=0)
            w = tl.load(w_rows + cols[None, :], mask=col_mask[:, None] & k_mask, other=0)
        if IS_FLOAT:
            x = quantize_tile(x.to(tl.float32), scale, zero, is_valid, SYMMETRIC)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)

    if SPLIT_K > 1:
        acc, is_last = gather_partials(acc, partial_ptr, ticket_ptr, tile, SPLIT_K)
    else:
        is_last = True
    if is_last:
        if IS_FLOAT:
            x_zero = zero.to(tl.int32)
        else:
            scale = tl.load(x_scale_ptr + offs_m, mask=row_mask, other=0.0)
            x_zero = tl.zeros((BLOCK_M,), tl.int32)
            if HAS_ZERO:
                x_zero = tl.load(x_zero_ptr + offs_m, mask=row_mask, other=0)
        _store_output(
            acc, scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
            residual_ptr, y_ptr, offs_m, offs_n, M, N, stride_rm,
            HAS_ZERO, HAS_BIAS, HAS_LAYER_SCALE, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    is_symmetric: bool,
    config: Config | None,
    space: Workspace | None,
) -> Tensor:
    """The launch that both doors share; absent pointers are replaced by w_scale and never read."""
    (M, K), N = x.shape, w_scale.shape[0]
    assert w.shape == (N, K), f"int8_linear: w must have the CUDA layout [{N}, {K}], got {w.shape}"
    is_float = x.dtype is not torch.int8
    y = torch.empty((M, N), dtype=out_dtype, device=x.device)
    if not M or not N:
        return y
    x = x if K <= 1 or x.stride(1) == 1 else x.contiguous()
    if residual is not None and N > 1 and residual.stride(1) != 1:
        residual = residual.contiguous()
    config = config or pick(Shape(M, N, K, x.element_size()), device.arch(x.device))
    if config.split_k > 1 and space is None:
        space = workspace.of_current_stream(x.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    absent = w_scale
    launch.start(
        _int8_linear_kernel,
        (tiles, config.split_k),
        x,
        absent if x_scale is None else x_scale.contiguous(),
        absent if x_zero is None else x_zero.contiguous(),
        w.contiguous(),
        w_scale.contiguous(),
        w_sum.contiguous(),
        absent if bias is None else bias.contiguous(),
        absent if layer_scale is None else layer_scale.contiguous(),
        absent if residual is None else residual,
        y,
        absent if space is None else space.partials,
        absent if space is None else space.tickets,
        M, N, K, x.stride(0), 0 if residual is None else residual.stride(0),
        HAS_ZERO=x_zero is not None or (is_float and not is_symmetric),
        HAS_BIAS=bias is not None, HAS_LAYER_SCALE=layer_scale is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, IS_FLOAT=is_float,
        EVEN_K=K % config.block_k == 0, SYMMETRIC=is_symmetric, SPLIT_K=config.split_k,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


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
    return _launch(
        x_q, x_scale, x_zero, w, w_scale, w_sum, bias, residual, layer_scale, activation,
        out_dtype, x_zero is None, config, space,
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
    Each program reads its rows twice and quantizes them itself: worth it while few programs share
    a row (small N), a loss when many do; configs.predicted_us tells.
    """
    return _launch(
        x, None, None, w, w_scale, w_sum, bias, residual, layer_scale, activation,
        out_dtype, symmetric, config, space,
    )  # fmt: skip
