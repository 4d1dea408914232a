"""Configs of the row-wise kernels, and which launches of a block quantize their rows."""

from dataclasses import dataclass

from lraee.kernels.archs import Arch


@dataclass(frozen=True)
class RowConfig:
    """Rows of one program of a row-wise kernel, and its warps."""

    block_m: int
    num_warps: int


def row_config(M: int, K: int) -> RowConfig:
    """quantize_rows: a row a program, of a few warps where rows are few or wide."""
    if M <= 128:
        return RowConfig(1, num_warps=8 if K > 2048 else 4)
    return RowConfig(1, num_warps=4 if K > 2048 else 1)


def chunk_config(M: int, D: int) -> RowConfig:
    """layer_norm_quantize: two rows a warp, one where they are wide, more warps where they are few.

    An SM holds 32 programs, on sm_86 16: with two rows each, more rows are on their way, and gamma
    and beta are read once for both.
    """
    if D > 4096:
        return RowConfig(1, num_warps=4)
    if M <= 512:
        return RowConfig(1, num_warps=2)
    return RowConfig(2 if D <= 1280 else 1, num_warps=1)


HELD_VALUES = 64
"""Values of a row that each thread holds, at most."""
LONG_ROW_VALUES = 4096
"""Values at a time of a row that is too long to be held."""


def held_width(K: int, num_warps: int) -> int | None:
    """Width of the tiles that hold a row of K values: 8, 4 or 2 of each thread, or None.

    The widest one whose last tile leaves at most a sixteenth of the row empty: 8 values of two
    bytes are one load, and empty ones take as many instructions as others.
    """
    threads = 32 * num_warps
    if K > HELD_VALUES * threads:
        return None
    padded = {width: -(-K // width) * width for width in (8 * threads, 4 * threads, 2 * threads)}
    return next((w for w, size in padded.items() if size * 16 <= K * 17), 2 * threads)


FEW_ROWS = 512
"""Programs that each quantize a row: as many as a GPU runs at once; more would queue."""
LAUNCH_LESS_US = 2.0
"""The gap of 2.2 us between two launches and 1 us to start one (fitted to an H200), less four trips
to L2 of 0.3 us for tickets."""
MEMORY_SHARE = 0.75
"""Of the bandwidth of a datasheet."""


def quantizes_its_rows(M: int, K: int, arch: Arch) -> bool:
    """Whether the launch that makes M float rows of K values quantizes them too, in a block.

    The programs that do it, behind those of a product or of attention, run at half the speed of a
    launch of their own, for the registers of that kernel leave half the warps. So it pays while
    the rows take less than LAUNCH_LESS_US to read and to store. A block makes seven launches of few
    rows and nine of many; eight between, for rows of fc1 are four times as wide as attention's.
    """
    moved_us = 3 * M * K / (MEMORY_SHARE * arch.bandwidth_gb_s * 1e3)
    return M <= FEW_ROWS and moved_us < LAUNCH_LESS_US
