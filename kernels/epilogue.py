"""What the kernel families of int8_linear share: the order of tiles, and what follows a product."""

import triton
import triton.language as tl

from lraee.kernels.common import activate


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
def before_residual(
    acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr, offs_n, N,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """act((acc - x_zero * w_sum) * (x_scale * w_scale) + bias) * layer_scale, float32.

    Args:
      acc: int32 [BLOCK_M, BLOCK_N], the sums of columns offs_n, of N.
      x_scale, x_zero: of the rows, float32 and int32 [BLOCK_M].
    Elementwise throughout: Gluon, where offs_n and the rows have layouts, calls it as well.
    """
    col_mask = offs_n < N
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
    return y
