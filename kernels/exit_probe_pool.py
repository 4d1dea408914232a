"""First launch of exit_probe: tokens to the quantized row of the head, and their variance.

See lraee.kernels.exit_probe, [NOTE: probe algebra].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch
from lraee.kernels.common import (
    LANES,
    lane_sum,
    load_row,
    normalise_row,
    quantize_tile,
    quantizer,
    row_range,
)
from lraee.kernels.configs import ProbeConfig
from lraee.kernels.meeting import last_to_arrive
from lraee.kernels.workspace import Workspace

Quantized = tuple[Tensor, Tensor, Tensor]

WIDEST_OF_ONE_WARP = 1536
"""Values of a row that one warp holds; two share a longer one.

On sm_120 1,536 values take 184 registers of each thread of one warp, 2,048 take all 255, and in two
warps 168 (Triton 3.8, bench/gpu_matrix).
"""


@triton.jit(do_not_specialize=["B"])
def _pool_kernel(
    z_ptr, gamma_ptr, beta_ptr, eps, pooled_ptr, spread_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr,
    variance_ptr, ticket_ptr, B, N, D, P, stride_b, stride_l,
    HAS_CLASS_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    D_CHUNKS: tl.constexpr, P_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of BLOCK_D channels of one image, and their class token as it is; in the
    image's last program also variance = sum over channels and x_q = quantize(LayerNorm(pooled)).
    """
    image = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    tokens = z_ptr + image * stride_b + offs_d
    patches = tokens + stride_l
    pooled_row = pooled_ptr + image * P
    spread_row = spread_ptr + image * D
    if HAS_CLASS_TOKEN:
        class_token = tl.load(tokens, mask=mask, other=0.0).to(tl.float32)
        tl.store(pooled_row + D + offs_d, class_token, mask=mask, cache_modifier=".cg")
    shift = tl.load(patches, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.zeros((BLOCK_D,), tl.float32)
    s2 = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, N, UNROLL):
        for u in tl.static_range(UNROLL):
            is_token = first + u < N
            z = tl.load(patches + (first + u) * stride_l, mask=mask & is_token, other=0.0)
            difference = tl.where(is_token, z.to(tl.float32) - shift, 0.0)
            s1 += difference
            s2 += difference * difference
    count = tl.cast(N, tl.float32)
    variance = tl.div_rn(s2 - tl.div_rn(s1 * s1, count), count)
    variance = tl.where(variance < 0.0, 0.0, variance)  # keeps NaN, as maximum would not
    mean = shift + tl.div_rn(s1, count)
    tl.store(pooled_row + offs_d, mean, mask=mask, cache_modifier=".cg")
    tl.store(spread_row + offs_d, variance, mask=mask, cache_modifier=".cg")
    if last_to_arrive(ticket_ptr + image, tl.num_programs(1)):
        rows = image + tl.arange(0, 1)
        everything = tl.full((1,), True, tl.int1)
        offs_row = tl.zeros((1,), tl.int64)
        spread = load_row(spread_row, offs_row, everything, D, D_CHUNKS)
        tl.store(variance_ptr + rows, lane_sum(spread))
        pooled = load_row(pooled_row, offs_row, everything, P, P_CHUNKS)
        x = normalise_row(pooled, gamma_ptr, beta_ptr, eps, P)
        lo, hi = row_range(x)
        scale, zero, is_valid = quantizer(lo, hi, False)
        tl.store(x_scale_ptr + rows, scale)
        tl.store(x_zero_ptr + rows, zero.to(tl.int32))
        for c in tl.static_range(P_CHUNKS):
            cols = c * LANES + tl.arange(0, LANES)[None, :]
            x_q = quantize_tile(x[c], scale, zero, is_valid, False)
            tl.store(x_q_ptr + image * P + cols, x_q, mask=cols < P)


def pool_tokens(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    variance: Tensor,
    *,
    config: ProbeConfig,
    space: Workspace,
) -> Quantized:
    """quantize(LayerNorm(pooled)) of each image; writes the spatial variance of its patches.

    Args:
      z: float32, bfloat16 or float16 [B >= 1, L, D], the values of a token side by side.
      gamma: float32 [P], P = D for the patch mean alone or 2 D for the class token behind it.
      beta: float32 [P].
      eps: added to the variance of the LayerNorm.
      variance: float32 [B], written.
      config: tiles and warps.
      space: where the programs of an image meet.
    Returns: x_q int8 [B, P], x_scale float32 [B], x_zero int32 [B].
    """
    (B, L, D), P = z.shape, gamma.shape[0]
    assert P in (D, 2 * D), f"exit_probe: gamma must have shape [{D}] or [{2 * D}]"
    pooled = torch.empty((B, P), dtype=torch.float32, device=z.device)
    spread = torch.empty((B, D), dtype=torch.float32, device=z.device)
    x_q = torch.empty((B, P), dtype=torch.int8, device=z.device)
    x_scale = torch.empty(B, dtype=torch.float32, device=z.device)
    x_zero = torch.empty(B, dtype=torch.int32, device=z.device)
    launch.start(
        _pool_kernel, (B, triton.cdiv(D, config.block_d)),
        z, gamma.contiguous(), beta.contiguous(), eps, pooled, spread, x_q, x_scale, x_zero,
        variance, space.tickets, B, L - 1, D, P, z.stride(0), z.stride(1),
        HAS_CLASS_TOKEN=P != D, BLOCK_D=config.block_d, UNROLL=config.unroll,
        D_CHUNKS=triton.cdiv(D, 64), P_CHUNKS=triton.cdiv(P, 64),
        num_warps=1 if P <= WIDEST_OF_ONE_WARP else 2,
    )  # fmt: skip
    return x_q, x_scale, x_zero
