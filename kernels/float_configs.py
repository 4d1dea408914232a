"""The tiling of float_linear, and how its sums are cut."""

import math
from dataclasses import dataclass

from lraee.kernels.archs import Arch
from lraee.kernels.configs import WORKSPACE_PARTIALS


@dataclass(frozen=True)
class FloatConfig:
    """The tiling of float_linear; block_k is part of the order of sums."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


SEGMENT_K = 512
"""Values of K that float_linear sums before it adds them to the sum of those before."""


def float_config(K: int, x_bytes: int) -> FloatConfig:
    """float_linear: one tiling, whatever the batch; the patches of an image fill 64 rows.

    Of six measured on an H200 it was the fastest or within 5 % of it at 49 to 6,272 rows of
    float16. In float32 a wider one spills, and so do 4 warps where rows are not aligned.
    """
    if x_bytes == 2:
        return FloatConfig(64, 64, 64, num_warps=4, num_stages=4)
    return FloatConfig(64, 32, 32, num_warps=4 if K % 16 == 0 else 8, num_stages=4)


def segments_at_once(config: FloatConfig, tiles: int, K: int, arch: Arch) -> int:
    """Programs of a tile of float_linear: one, or one a segment where tiles are fewer than SMs."""
    segments = max(1, math.ceil(K / SEGMENT_K))
    partials = tiles * segments * config.block_m * config.block_n
    return segments if tiles < arch.sms and partials <= WORKSPACE_PARTIALS else 1
