"""gated_quantize for CUDA: one program owns a row, held in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, live_rows
from lraee.kernels.common import (
    LANES,
    SMALLEST_SCALE,
    activate,
    live_count,
    load_row,
    normalise_row,
    quantize_tile,
    quantizer,
    row_range,
)
from lraee.kernels.configs import RowConfig, chunk_config
from lraee.kernels.quantize_rows import empty_quantized

GatedRows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _gated_quantize_kernel(
    x_ptr, gamma_ptr, beta_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, r_q_ptr, r_scale_ptr,
    live_ptr, M, rows_per_image, H, stride_xm, eps,
    HAS_LIVE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BETA: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """v = act(x[:, :H]) * x[:, H:] of BLOCK_M rows, normed where HAS_NORM, in two terms.

    v ~ (x_q - x_zero) * x_scale + r_q * r_scale. Rows are held as chunks (see common).
    """
    M = live_count(M, live_ptr, rows_per_image, HAS_LIVE)
    if HAS_LIVE and tl.program_id(0) * BLOCK_M >= M:
        return
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < M
    starts = offs_m.to(tl.int64) * stride_xm
    gate = load_row(x_ptr, starts, row_mask, H, CHUNKS)
    up = load_row(x_ptr + H, starts, row_mask, H, CHUNKS)
    v = ()
    for c in tl.static_range(CHUNKS):
        v = v + (activate(gate[c], ACTIVATION) * up[c],)  # type: ignore[assignment]
    if HAS_NORM:
        v = normalise_row(v, gamma_ptr, beta_ptr, eps, H, HAS_BETA)
    lo, hi = row_range(v)
    scale, zero, is_valid = quantizer(lo, hi, False)
    r_scale = tl.div_rn(scale, tl.full(scale.shape, 254.0, tl.float32))
    r_scale = tl.where(r_scale < SMALLEST_SCALE, 1.0, r_scale)  # NaN stays
    tl.store(x_scale_ptr + offs_m, scale, mask=row_mask)
    tl.store(x_zero_ptr + offs_m, zero.to(tl.int32), mask=row_mask)
    tl.store(r_scale_ptr + offs_m, r_scale, mask=row_mask)
    rows = offs_m.to(tl.int64)[:, None] * H
    for c in tl.static_range(CHUNKS):
        cols = c * LANES + tl.arange(0, LANES)
        mask = row_mask[:, None] & (cols[None, :] < H)
        x_q = quantize_tile(v[c], scale, zero, is_valid, False)
        rest = v[c] - (x_q.to(tl.float32) - zero[:, None]) * scale[:, None]
        limit = 127.0 * r_scale[:, None]
        rest = tl.minimum(tl.maximum(rest, -limit), limit)
        r_q = quantize_tile(rest, r_scale, zero, is_valid, True)
        tl.store(x_q_ptr + rows + cols[None, :], x_q, mask=mask)
        tl.store(r_q_ptr + rows + cols[None, :], r_q, mask=mask)


def gated_quantize(
    x: Tensor,
    activation: str,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 0.0,
    *,
    config: RowConfig | None = None,
) -> GatedRows:
    """act(x[:, :H]) * x[:, H:] in two terms of int8; see lraee.ops.reference.

    Args:
      x: float32, bfloat16 or float16 [M, 2 H].
      activation, gamma, beta, eps: as in lraee.ops.reference.gated_quantize.
      config: rows and warps of a program; chosen by shape when None.
    Returns: x_q, x_scale, x_zero, r_q, r_scale.
    """
    M, H = x.shape[0], x.shape[1] // 2
    x = x if H <= 1 or x.stride(1) == 1 else x.contiguous()
    config = config or chunk_config(M, 2 * H)
    x_q, x_scale, x_zero = empty_quantized(M, H, x.device)
    r_q = torch.empty((M, H), dtype=torch.int8, device=x.device)
    r_scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M:
        live_ptr, rows_per_image, has_live = live_rows.operands(M, x)
        launch.start(
            _gated_quantize_kernel,
            (triton.cdiv(M, config.block_m),),
            x, x if gamma is None else gamma.contiguous(), x if beta is None else beta.contiguous(),
            x_q, x_scale, x_zero, r_q, r_scale, live_ptr, M, rows_per_image, H, x.stride(0), eps,
            HAS_LIVE=has_live, ACTIVATION=activation,
            HAS_NORM=gamma is not None, HAS_BETA=beta is not None,
            CHUNKS=max(1, triton.cdiv(H, 64)), BLOCK_M=config.block_m, num_warps=config.num_warps,
        )  # fmt: skip
    return x_q, x_scale, x_zero, r_q, r_scale
