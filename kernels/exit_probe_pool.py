"""First part of exit_probe: tokens to the quantized row of the head, and their variance.

See lraee.kernels.exit_probe, [NOTE: probe algebra].
"""

import triton
import triton.language as tl

from lraee.kernels.common import (
    LANES,
    fold_lanes,
    quantize_tile,
    quantizer,
    value_range,
)


@triton.jit
def pool_channels(
    z_ptr, pooled_ptr, spread_ptr, image, part, N, D, P, stride_b, stride_l,
    HAS_CLASS_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Stores mean and variance of BLOCK_D channels of one image, and their class token as it is."""
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    tokens = z_ptr + image * stride_b + offs_d
    patches = tokens + stride_l
    pooled_row = pooled_ptr + image * P
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
    tl.store(spread_ptr + image * D + offs_d, variance, mask=mask, cache_modifier=".cg")


@triton.jit
def _chunk(ptr, c, size):
    """Values 64 c .. of a row as float32 [1, 64], zero beyond its size."""
    cols = c * LANES + tl.arange(0, LANES)[None, :]
    return tl.load(ptr + cols, mask=cols < size, other=0.0).to(tl.float32)


@triton.jit
def _centred(ptr, mean, c, size):
    """The same minus the mean of the row."""
    cols = c * LANES + tl.arange(0, LANES)[None, :]
    return tl.where(cols < size, _chunk(ptr, c, size) - mean[:, None], 0.0)


@triton.jit
def _sum(ptr, size):
    """lane_sum of a row (see common): [1]."""
    lanes = tl.zeros((1, LANES), tl.float32)
    for c in tl.range(0, tl.cdiv(size, LANES), loop_unroll_factor=8):
        lanes += _chunk(ptr, c, size)
    return fold_lanes(lanes)


@triton.jit
def _sum_of_squares(ptr, mean, size):
    """lane_sum of (x - mean)^2: [1]."""
    lanes = tl.zeros((1, LANES), tl.float32)
    for c in tl.range(0, tl.cdiv(size, LANES), loop_unroll_factor=8):
        centred = _centred(ptr, mean, c, size)
        lanes += centred * centred
    return fold_lanes(lanes)


@triton.jit
def _normalised(ptr, gamma_ptr, beta_ptr, mean, rstd, c, size):
    """Values 64 c .. of the LayerNorm of a row, zero beyond its size: [1, 64]."""
    y = _centred(ptr, mean, c, size) * rstd[:, None]
    return y * _chunk(gamma_ptr, c, size) + _chunk(beta_ptr, c, size)


@triton.jit
def normalise_pooled(
    pooled_ptr, spread_ptr, gamma_ptr, beta_ptr, eps, x_q_ptr, x_scale_ptr, x_zero_ptr,
    variance_ptr, image, D, P,
):  # fmt: skip
    """Stores x_q = quantize(LayerNorm(pooled)) of one image and its variance over all channels.

    A row is gone through from L1 five times. Held in registers, as by layer_norm_quantize, one of
    2,560 values spilled on sm_120, and compiling took 15 s at 1,536 (Triton 3.8).
    """
    rows = image + tl.arange(0, 1)
    tl.store(variance_ptr + rows, _sum(spread_ptr + image * D, D))
    pooled_row = pooled_ptr + image * P
    size = tl.cast(P, tl.float32)
    mean = tl.div_rn(_sum(pooled_row, P), size)
    variance = tl.div_rn(_sum_of_squares(pooled_row, mean, P), size)
    rstd = tl.div_rn(tl.full((1,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    lo = tl.zeros((1, LANES), tl.float32)
    hi = tl.zeros((1, LANES), tl.float32)
    chunks = tl.cdiv(P, LANES)
    for c in tl.range(0, chunks, loop_unroll_factor=8):
        chunk_lo, chunk_hi = value_range(
            _normalised(pooled_row, gamma_ptr, beta_ptr, mean, rstd, c, P)
        )
        lo, hi = tl.minimum(lo, chunk_lo), tl.maximum(hi, chunk_hi)
    scale, zero, is_valid = quantizer(tl.min(lo, axis=1), tl.max(hi, axis=1), False)
    tl.store(x_scale_ptr + rows, scale)
    tl.store(x_zero_ptr + rows, zero.to(tl.int32))
    for c in tl.range(0, chunks, loop_unroll_factor=8):
        cols = c * LANES + tl.arange(0, LANES)[None, :]
        y = _normalised(pooled_row, gamma_ptr, beta_ptr, mean, rstd, c, P)
        x_q = quantize_tile(y, scale, zero, is_valid, False)
        tl.store(x_q_ptr + image * P + cols, x_q, mask=cols < P)
