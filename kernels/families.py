"""Families of int8_linear beside the simple kernel: what may be launched, and in which tiles."""

import functools
import importlib
import math

from lraee.kernels.archs import Arch
from lraee.kernels.tiling import Config, Shape, accumulators_per_thread, shared_bytes


def specializes_warps(config: Config, arch: Arch) -> bool:
    """Whether a persistent launch gives loads warps of their own.

    On sm_90 in 4 warps, of which Triton makes two groups that multiply where there are 256 rows; on
    sm_100 in 8, for 4 spill.
    """
    return (arch.capability, config.num_warps) in ((90, 4), (100, 8))


def legal_persistent(config: Config, shape: Shape, arch: Arch) -> bool:
    """Rows at multiples of 16 bytes; the tiles of x, w and y in shared memory."""
    is_split = specializes_warps(config, arch) and config.block_m == 256
    staged = 2 * config.block_m * config.block_n if arch.capability >= 90 else 0
    most = 128 if specializes_warps(config, arch) and config.num_warps == 4 else 64
    return (
        {config.block_m, config.block_n, config.block_k} <= {64, 128, 256}
        and config.num_warps in (4, 8)
        and config.num_stages >= 1
        and config.split_k == 1
        and shape.K % 16 == shape.N % 8 == 0
        and shared_bytes(config) + staged + 1024 <= arch.shared_per_block
        and accumulators_per_thread(config) <= most * (2 if is_split else 1)
    )


def persistent_programs(config: Config, shape: Shape, arch: Arch) -> int:
    """Programs of a persistent launch: one an SM, or a tile each where there are fewer."""
    tiles = math.ceil(shape.M / config.block_m) * math.ceil(shape.N / config.block_n)
    programs: int = min(arch.sms, tiles)
    return programs


def persistent_config(arch: Arch, *, has_residual: bool) -> Config:
    """The largest tile of a persistent launch that does not spill in Triton 3.6 and 3.8."""
    numbers = {
        90: (256, 64, 128, 4, 4) if has_residual else (256, 128, 128, 4, 3),
        100: (128, 64, 128, 8, 3) if has_residual else (128, 128, 128, 8, 3),
        80: (128, 128, 128, 8, 3),
    }.get(arch.capability, (128, 128, 64, 8, 3))
    return Config(*numbers, family="persistent")


@functools.cache
def gluon_unavailable_reason() -> str | None:
    """Why products in Gluon cannot be used by this installation, or None; looks at no device."""
    try:
        importlib.import_module("lraee.kernels.int8_linear_gluon")
    except (ImportError, AttributeError) as error:
        return f"gluon products: this Triton has no Gluon that they are written for: {error}"
    return None


def legal_gluon(config: Config, shape: Shape, arch: Arch) -> bool:
    """A tile of 128 x 128 for each of two groups of warps on sm_90, and the column of w at hand."""
    tile = (config.block_m, config.block_n, config.block_k, config.num_warps, config.split_k)
    shared = 128 * (shape.K + 128 * config.num_stages) + 2 * 2 * 128 * 64 + 1024
    return (
        arch.capability == 90
        and tile == (128, 128, 128, 4, 1)
        and config.num_stages >= 2
        and shape.K % 128 == shape.N % 8 == 0
        and shared <= arch.shared_per_block
        and gluon_unavailable_reason() is None
    )


def gluon_config(shape: Shape) -> Config:
    """The tile of products in Gluon, with stages for what memory the column of w leaves."""
    return Config(128, 128, 128, 4, num_stages=3 if shape.K <= 768 else 2, family="gluon")
