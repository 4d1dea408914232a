"""int8_linear on sm_90 in Gluon: two groups of warps alternate, the weight's column stays at hand.

A program takes a run of tiles, column after column. Its copying warp loads a column of w, BLOCK_N x
K, once and then tiles of x through a ring of stages. Of two groups of four warps each takes every
other tile: while one multiplies, the other finishes its tile.

[NOTE: barriers] Each is an mbarrier, of which a phase ends with its count of arrivals:
  full[s]   a tile of x is in stage s: 1, and its bytes
  empty[s]  it was multiplied: 1, of the group that did it
  w_full    the column is there: 1, and its bytes
  w_free    both groups are done with the column: 2
  order[g]  group g may multiply: 1, of the other group when all its products are issued
A wait names the parity of a phase alone. Without `order` a group may look at a stage that the ring
went round twice meanwhile, and take the parity of another phase for that of its own:
bench/barrier_model.py goes through every interleaving and shows it.

Gluon is an experimental part of Triton: this module cannot be imported everywhere, see
families.gluon_unavailable_reason. No GPU has run it.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lraee.kernels import device, launch
from lraee.kernels.archs import Arch
from lraee.kernels.epilogue import before_residual
from lraee.kernels.int8_linear_persistent import is_tileable
from lraee.kernels.operands import PackedLinear
from lraee.kernels.tiling import Config

CONSUMER_REGISTERS, COPY_REGISTERS = 232, 24
"""Of 65,536: 2 x 128 threads that multiply, 128 that copy."""


@gluon.jit
def _copy(
    x_tiles, w_tiles, xs, ws, empty, full, w_full, w_free, first, last, tiles_m,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Loads the columns of w and the tiles of x of all tiles of this program, in their order."""
    step = 0
    run = 0
    tile = first
    while tile < last:
        n = tile // tiles_m
        end = gl.minimum((n + 1) * tiles_m, last)
        mbarrier.wait(w_free, (run & 1) ^ 1)
        mbarrier.expect(w_full, BLOCK_N * BLOCK_K * STEPS)
        for part in gl.static_range(STEPS):
            tma.async_copy_global_to_shared(
                w_tiles, [n * BLOCK_N, part * BLOCK_K], w_full, ws.index(part)
            )
        while tile < end:
            for k in range(STEPS):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, BLOCK_M * BLOCK_K)
                tma.async_copy_global_to_shared(
                    x_tiles, [(tile % tiles_m) * BLOCK_M, k * BLOCK_K], bar, xs.index(stage)
                )
                step += 1
            tile += 1
        run += 1


@gluon.jit
def _finish(
    acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles, staged, m, n, N,
    HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Stores the columns from n on of a tile: what follows the product, by way of shared memory."""
    layout: gl.constexpr = acc.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    offs_n = n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    y = before_residual(
        acc, gl.convert_layout(x_scale, rows), gl.convert_layout(x_zero, rows), w_scale_ptr,
        w_sum_ptr, bias_ptr, bias_ptr, offs_n, N, HAS_ZERO, HAS_BIAS, False, ACTIVATION,
    )  # fmt: skip
    tma.store_wait(0)
    staged.store(y.to(staged.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_tiles, [m, n], staged)


@gluon.jit
def _multiply(
    x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles, xs, ws, empty, full, w_full,
    w_free, order, out, first, last, tiles_m, M, N,
    HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Every other tile of this program, those of group GROUP."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    staged = out.index(GROUP)
    run = 0
    turn = 0
    tile = first
    while tile < last:
        n = tile // tiles_m * BLOCK_N
        end = gl.minimum((tile // tiles_m + 1) * tiles_m, last)
        mbarrier.wait(w_full, run & 1)
        own = tile + ((tile - first + GROUP) & 1)
        while own < end:
            m = (own % tiles_m) * BLOCK_M
            mbarrier.wait(order.index(GROUP), turn & 1)
            acc = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, layout)
            step = (own - first) * STEPS
            for k in range(STEPS):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                acc = warpgroup_mma(
                    xs.index(step % STAGES), ws.index(k).permute((1, 0)), acc, use_acc=k > 0,
                    is_async=True,
                )  # fmt: skip
                # The product before is done, and its stage free
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
                step += 1
            mbarrier.arrive(order.index(1 - GROUP), count=1)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            offs_m = m + gl.arange(0, BLOCK_M, layout=rows)
            x_scale = gl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
            x_zero = gl.zeros((BLOCK_M,), gl.int32, rows)
            if HAS_ZERO:
                x_zero = gl.load(x_zero_ptr + offs_m, mask=offs_m < M, other=0)
            # Columns in two halves: whole, what is loaded for all of them spills
            halves = acc.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
            for part in gl.static_range(2):
                _finish(
                    halves[part], x_scale, x_zero, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles,
                    staged, m, n + part * (BLOCK_N // 2), N, HAS_ZERO, HAS_BIAS, ACTIVATION,
                )  # fmt: skip
            turn += 1
            own += 2
        mbarrier.arrive(w_free, count=1)
        tile = end
        run += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _int8_linear_gluon_kernel(
    x_tiles, x_scale_ptr, x_zero_ptr, w_tiles, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles, M, N,
    HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr, CONSUMER: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """An equal share of all tiles, numbered down the columns; see [NOTE: barriers]."""
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x_tiles.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STEPS, BLOCK_N, BLOCK_K], w_tiles.layout)
    out = gl.allocate_shared_memory(y_tiles.dtype, [2, BLOCK_M, BLOCK_N // 2], y_tiles.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    w_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    mbarrier.init(w_full, count=1)
    mbarrier.init(w_free, count=2)
    mbarrier.arrive(order.index(0), count=1)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles = tiles_m * gl.cdiv(N, BLOCK_N)
    first = tiles * gl.program_id(0) // gl.num_programs(0)
    last = tiles * (gl.program_id(0) + 1) // gl.num_programs(0)
    gl.warp_specialize([
        (_multiply, (
            x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles, xs, ws, empty, full,
            w_full, w_free, order, out, first, last, tiles_m, M, N, HAS_ZERO, HAS_BIAS, ACTIVATION,
            BLOCK_M, BLOCK_N, STAGES, STEPS, 0,
        )),
        (_multiply, (
            x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, y_tiles, xs, ws, empty, full,
            w_full, w_free, order, out, first, last, tiles_m, M, N, HAS_ZERO, HAS_BIAS, ACTIVATION,
            BLOCK_M, BLOCK_N, STAGES, STEPS, 1,
        )),
        (_copy, (
            x_tiles, w_tiles, xs, ws, empty, full, w_full, w_free, first, last, tiles_m, BLOCK_M,
            BLOCK_N, BLOCK_K, STAGES, STEPS,
        )),
    ], [4, 1], [CONSUMER, COPY])  # fmt: skip


def _tiles(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A descriptor of tiles [rows, cols] of a matrix with rows at multiples of 16 bytes."""
    dtype = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols], layout)


def int8_linear_gluon(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    config: Config,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float16,
    arch: Arch | None = None,
) -> Tensor:
    """int8_linear in a config of the family gluon, the same bits; of all rows, live or not.

    Args:
      linear: without a layer scale, which spills (Triton 3.6).
      config: legal for the shape; M, N and K are not 0.
      out_dtype: float16 or bfloat16.
      arch: that of the device when None.
      others: as in int8_linear, without a residual.
    """
    (M, K), N = x_q.shape, linear.N
    w, w_scale, w_sum, bias, layer_scale = linear
    assert layer_scale is None, "int8_linear_gluon: has no layer scale"
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    x_q = x_q if is_tileable(x_q) else x_q.clone(memory_format=torch.contiguous_format)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    arch = arch or device.arch(x_q.device)
    launch.start(
        _int8_linear_gluon_kernel,
        (min(arch.sms, tiles),),
        _tiles(x_q, config.block_m, config.block_k),
        x_scale.contiguous(), w_sum if x_zero is None else x_zero.contiguous(),
        _tiles(w.contiguous(), config.block_n, config.block_k),
        w_scale.contiguous(), w_sum.contiguous(), w_scale if bias is None else bias.contiguous(),
        _tiles(y, config.block_m, config.block_n // 2),
        M, N,
        HAS_ZERO=x_zero is not None, HAS_BIAS=bias is not None, ACTIVATION=activation,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        STAGES=config.num_stages, STEPS=K // config.block_k,
        CONSUMER=CONSUMER_REGISTERS, COPY=COPY_REGISTERS, num_warps=config.num_warps,
    )  # fmt: skip
    return y
