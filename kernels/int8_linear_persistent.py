"""int8_linear by persistent programs: one source for every family, tiles by tensor descriptors.

A program takes every so many-th tile, so that one launch has no waves of programs. From sm_90 on
descriptors are copies by the tensor memory accelerator, and on sm_90 warps are specialized: four
copy tiles, two times four multiply them and finish a tile each, so that one multiplies while the
other does its epilogue. Elsewhere Triton turns descriptors into masked loads.

Descriptors are made on the device: those of the host cannot be split between two groups of warps
(Triton 3.6, 3.8) and are not pipelined before sm_90. Each program writes its own first, into
scratch memory that Triton takes from the allocator of this launch.
"""

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import device, launch, live_rows
from lraee.kernels.archs import Arch
from lraee.kernels.common import convert
from lraee.kernels.epilogue import before_residual, tile_of
from lraee.kernels.families import persistent_programs, specializes_warps
from lraee.kernels.operands import PackedLinear
from lraee.kernels.tiling import Config, Shape


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def _int8_linear_persistent_kernel(
    x_ptr, x_scale_ptr, x_zero_ptr, w_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
    residual_ptr, y_ptr, M, N, K, stride_xm, stride_rm, live_ptr, rows_per_image,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIVE: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + num_programs, … of y, those without a live row left out.

    HAS_LIVE: as in int8_linear; rows that are not live are neither read nor written.
    """
    if HAS_LIVE:
        M = tl.minimum(tl.load(live_ptr) * rows_per_image, M)
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_tiles = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    residual_tiles = y_tiles
    if HAS_RESIDUAL:
        residual_tiles = tl.make_tensor_descriptor(
            residual_ptr, [M, N], [stride_rm, 1], [BLOCK_M, BLOCK_N]
        )
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(x_tiles.load([m, k]), w_tiles.load([n, k]).T, acc, out_dtype=tl.int32)
        offs_m = m + tl.arange(0, BLOCK_M)
        x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
        x_zero = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_ZERO:
            x_zero = tl.load(x_zero_ptr + offs_m, mask=offs_m < M, other=0)
        result = before_residual(
            acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, layer_scale_ptr,
            n + tl.arange(0, BLOCK_N), N, HAS_ZERO, HAS_BIAS, HAS_LAYER_SCALE, ACTIVATION,
        )  # fmt: skip
        if HAS_RESIDUAL:
            result += residual_tiles.load([m, n]).to(tl.float32)
        y_tiles.store([m, n], convert(result, y_ptr.dtype.element_ty))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of Triton's descriptors, of the current stream as any other tensor."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _start(grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """launch.start with our allocator, which no other launch of the application sees."""

    def start() -> None:
        triton.set_allocator(_scratch)
        launch.start(_int8_linear_persistent_kernel, grid, *arguments, **constants)

    contextvars.copy_context().run(start)


def int8_linear_persistent(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    config: Config,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    arch: Arch | None = None,
) -> Tensor:
    """int8_linear in a config of the family persistent, the same bits.

    Args:
      config: legal for the shape; M, N and K are not 0.
      arch: that of the device when None.
      others: as in int8_linear; K and the strides of x_q are multiples of 16 bytes, as are those of
        the residual and of y.
    """
    (M, K), N = x_q.shape, linear.N
    w, w_scale, w_sum, bias, layer_scale = linear
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    x_q = x_q if is_tileable(x_q) else x_q.clone(memory_format=torch.contiguous_format)
    if residual is not None and not is_tileable(residual):
        residual = residual.clone(memory_format=torch.contiguous_format)
    live, absent = live_rows.current(), w_scale
    arch = arch or device.arch(x_q.device)
    operands = (x_scale, x_zero, w, w_scale, w_sum, bias, layer_scale)
    _start(
        (persistent_programs(config, Shape(M, N, K), arch),),
        x_q,
        *(absent if operand is None else operand.contiguous() for operand in operands),
        y if residual is None else residual,
        y,
        M, N, K, x_q.stride(0), 0 if residual is None else residual.stride(0),
        absent if live is None else live.images, 0 if live is None else live.rows_per_image(M),
        HAS_ZERO=x_zero is not None, HAS_BIAS=bias is not None,
        HAS_LAYER_SCALE=layer_scale is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation, HAS_LIVE=live is not None,
        WARP_SPECIALIZE=specializes_warps(config, arch),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def is_tileable(x: Tensor) -> bool:
    """Whether a descriptor can describe a matrix: rows and its start at multiples of 16 bytes."""
    size = x.element_size()
    starts = (x.stride(0) * size, x.storage_offset() * size)
    return bool(x.stride(1) == 1 and all(start % 16 == 0 for start in starts))
