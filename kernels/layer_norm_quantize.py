"""layer_norm_quantize for CUDA: one pass, rows in registers."""

import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, live_rows
from lraee.kernels.common import (
    LANES,
    live_count,
    load_row,
    normalise_row,
    quantize_tile,
    quantizer,
    row_range,
)
from lraee.kernels.configs import RowConfig, chunk_config
from lraee.kernels.quantize_rows import Quantized, empty_quantized


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _layer_norm_quantize_kernel(
    x_ptr, gamma_ptr, beta_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, live_ptr, M, rows_per_image, D,
    stride_xm, eps, HAS_LIVE: tl.constexpr, HAS_BETA: tl.constexpr, SYMMETRIC: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x_q[m] = quantize(((x[m] - mean) * rstd) * gamma + beta) for BLOCK_M rows, each read once.

    The row is held as chunks (see common, [NOTE: a row as chunks]), so that the two sums and with
    them x_q are bit-equal to the definition.
    """
    M = live_count(M, live_ptr, rows_per_image, HAS_LIVE)
    if HAS_LIVE and tl.program_id(0) * BLOCK_M >= M:
        return
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < M
    x = load_row(x_ptr, offs_m.to(tl.int64) * stride_xm, row_mask, D, CHUNKS)
    y = normalise_row(x, gamma_ptr, beta_ptr, eps, D, HAS_BETA)
    lo, hi = row_range(y)
    scale, zero, is_valid = quantizer(lo, hi, SYMMETRIC)
    tl.store(x_scale_ptr + offs_m, scale, mask=row_mask)
    tl.store(x_zero_ptr + offs_m, zero.to(tl.int32), mask=row_mask)
    x_q_rows = x_q_ptr + offs_m.to(tl.int64)[:, None] * D
    for c in tl.static_range(CHUNKS):
        cols = c * LANES + tl.arange(0, LANES)
        x_q = quantize_tile(y[c], scale, zero, is_valid, SYMMETRIC)
        tl.store(x_q_rows + cols[None, :], x_q, mask=row_mask[:, None] & (cols[None, :] < D))


def layer_norm_quantize(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    symmetric: bool,
    *,
    config: RowConfig | None = None,
) -> Quantized:
    """quantize_rows(LayerNorm(x) * gamma + beta); see lraee.ops.reference.

    Args:
      x: float32, bfloat16 or float16 [M, D].
      gamma, beta: any float type [D]; beta None: RMSNorm.
      eps: added to the variance.
      symmetric: as in quantize_rows.
      config: rows and warps of a program; chosen by shape when None.
    Returns: x_q int8 [M, D], x_scale float32 [M], x_zero int32 [M].
    """
    M, D = x.shape
    x = x if D <= 1 or x.stride(1) == 1 else x.contiguous()
    config = config or chunk_config(M, D)
    x_q, x_scale, x_zero = empty_quantized(M, D, x.device)
    if M:
        live_ptr, rows_per_image, has_live = live_rows.operands(M, x)
        launch.start(
            _layer_norm_quantize_kernel,
            (triton.cdiv(M, config.block_m),),
            x, gamma.contiguous(), gamma if beta is None else beta.contiguous(), x_q, x_scale,
            x_zero, live_ptr, M, rows_per_image, D, x.stride(0), eps,
            HAS_LIVE=has_live, HAS_BETA=beta is not None, SYMMETRIC=symmetric,
            CHUNKS=max(1, triton.cdiv(D, 64)),
            BLOCK_M=config.block_m, num_warps=config.num_warps,
        )  # fmt: skip
    return x_q, x_scale, x_zero
