"""Launch configurations as data: one rule of legality, one table, one cost model. No autotuning.

A config never changes a result: int32 sums are exact in any order and each epilogue works on one
element, so tiles and splits are free to differ between batch sizes and GPUs.
"""

import functools
import math
from dataclasses import dataclass

from lraee.kernels import first_use, tuned
from lraee.kernels.archs import Arch
from lraee.kernels.families import legal_gluon, legal_persistent, persistent_config
from lraee.kernels.measured import MEASURED
from lraee.kernels.tiling import Config as Config
from lraee.kernels.tiling import Shape as Shape
from lraee.kernels.tiling import accumulators_per_thread as accumulators_per_thread
from lraee.kernels.tiling import shared_bytes as shared_bytes

WORKSPACE_PARTIALS = 1 << 22
WORKSPACE_TICKETS = 1 << 16
"""Size of a workspace: int32 partial sums, and tickets of output tiles, row blocks or images."""


@dataclass(frozen=True)
class AttentionConfig:
    """Queries of one program of int8_attention, its warps and pipeline stages.

    unroll: tokens whose keys are loaded at once while their mean is summed in order.
    """

    block_i: int
    num_warps: int
    num_stages: int = 2
    unroll: int = 64


@dataclass(frozen=True)
class FloatAttentionConfig:
    """Queries and keys of one tile of float_attention, its warps and pipeline stages."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProbeConfig:
    """Tiles of exit_probe.

    rows: images of a block, 1 or 16. block_d, unroll: channels of one program and tokens in flight
    while pooling. block_k: inputs per step of a layer. block_h: hidden values quantized at once.
    """

    rows: int
    block_d: int = 256
    unroll: int = 16
    block_k: int = 128
    block_h: int = 256
    num_warps: int = 8


def legal(config: Config, shape: Shape, arch: Arch) -> bool:
    """The single statement of what may be launched; pick, the tuner and the tests all call it."""
    if config.family == "persistent":
        return bool(legal_persistent(config, shape, arch))
    if config.family == "gluon":
        return bool(legal_gluon(config, shape, arch))
    blocks = (config.block_m, config.block_n, config.block_k)
    if any(block & (block - 1) for block in blocks) or min(blocks) < 16:
        return False  # Triton: tiles are powers of two, products at least 16 wide
    if config.block_k < 32:
        return False  # smallest 8-bit product
    if config.num_warps not in (1, 2, 4, 8) or config.num_stages < 1:
        return False
    if shared_bytes(config) > arch.shared_per_block:
        return False
    # Twice as many were seen to spill: 128x256 and 64x256 on sm_90 and sm_100 (400-1300 bytes,
    # Triton 3.8, bench/gpu_matrix)
    if accumulators_per_thread(config) > 64:
        return False
    if config.split_k == 1:
        return True
    row_blocks = math.ceil(shape.M / config.block_m)
    tiles = row_blocks * math.ceil(shape.N / config.block_n)
    partials = tiles * config.split_k * config.block_m * config.block_n
    return bool(
        config.split_k <= math.ceil(shape.K / config.block_k)
        and 1 + row_blocks + tiles <= WORKSPACE_TICKETS
        and partials <= WORKSPACE_PARTIALS
    )


LOAD_LATENCY_US = 0.7
"""From the request of a tile in DRAM or L2 to its arrival; the time one pipeline stage hides."""


def predicted_us(config: Config, shape: Shape, arch: Arch) -> float:
    """Time of int8_linear in this tiling, launch excluded: waves of tiles, or bytes, or latency.

    A program makes `steps` trips over K. A trip takes the longest of: tensor-core time of the
    programs that share an SM, their share of L2 bandwidth, and latency over the stages in flight.
    The whole cannot beat DRAM. Split-K adds writing and reading the partial sums.
    """
    tiles = math.ceil(shape.M / config.block_m) * math.ceil(shape.N / config.block_n)
    programs = tiles * config.split_k
    by_shared = arch.shared_per_sm // max(1, shared_bytes(config) + 1024)
    registers = accumulators_per_thread(config) + 56
    by_registers = 65_536 // (registers * 32 * config.num_warps)
    resident = max(1, min(by_shared, by_registers, arch.warps_per_sm // config.num_warps))
    sharing = min(resident, math.ceil(programs / arch.sms))
    waves = math.ceil(programs / (arch.sms * resident))
    steps = math.ceil(math.ceil(shape.K / config.block_k) / config.split_k)

    tile_ops = 2 * config.block_m * config.block_n * config.block_k
    # Small tiles load more bytes per operation from shared memory than the tensor cores digest
    efficiency = 0.75 * min(1.0, config.block_m / 64, config.block_n / 64)
    compute_us = sharing * tile_ops / (arch.int8_tops * 1e6 / arch.sms * efficiency)
    tile_bytes = (config.block_m + config.block_n) * config.block_k
    l2_us = sharing * tile_bytes / (arch.l2_gb_s * 1e3 / arch.sms)
    latency_us = LOAD_LATENCY_US / max(1, config.num_stages - 1)
    busy_us: float = waves * (LOAD_LATENCY_US + steps * max(compute_us, l2_us, latency_us))
    if config.split_k > 1:
        partial_bytes = 8 * programs * config.block_m * config.block_n
        busy_us += 2 * LOAD_LATENCY_US + partial_bytes / (arch.l2_gb_s * 1e3)
    bytes_moved = (shape.M + shape.N) * shape.K + 4 * shape.M * shape.N
    dram_us: float = bytes_moved / (arch.bandwidth_gb_s * 1e3)
    return float(max(busy_us, dram_us))


# The table: candidates per family and bucket of M, chosen by the cost model above where nothing was
# measured (see measured.py).

_TINY = (
    Config(16, 64, 128, num_warps=4, num_stages=4),
    Config(16, 64, 128, num_warps=4, num_stages=4, split_k=4),
    Config(16, 32, 256, num_warps=4, num_stages=4),
    Config(16, 32, 256, num_warps=4, num_stages=4, split_k=4),
)
_SMALL = (
    Config(64, 32, 128, num_warps=4, num_stages=4),
    Config(64, 32, 128, num_warps=4, num_stages=4, split_k=2),
    Config(64, 32, 128, num_warps=4, num_stages=4, split_k=4),
    Config(32, 64, 128, num_warps=4, num_stages=4),
    Config(64, 64, 128, num_warps=4, num_stages=4),
    Config(64, 64, 128, num_warps=4, num_stages=4, split_k=2),
)
_MIDDLE = (
    Config(64, 64, 128, num_warps=4, num_stages=4),
    Config(64, 128, 128, num_warps=4, num_stages=3),
    Config(128, 64, 128, num_warps=4, num_stages=3),
    Config(64, 64, 128, num_warps=4, num_stages=3, split_k=2),
)
_LARGE = (
    Config(128, 128, 64, num_warps=8, num_stages=4),
    Config(128, 128, 128, num_warps=8, num_stages=3),
    Config(128, 64, 128, num_warps=4, num_stages=3),
)
_LARGE_90 = (
    Config(128, 128, 128, num_warps=8, num_stages=4),
    Config(64, 128, 128, num_warps=4, num_stages=4),
)

BUCKETS = (16, 64, 256)
"""Largest M of each bucket but the last."""

_BEFORE_90 = (_TINY, _SMALL, _MIDDLE, _LARGE)
_FROM_90 = (_TINY, _SMALL, _MIDDLE, _LARGE_90)
TABLE: dict[int, tuple[tuple[Config, ...], ...]] = {
    80: _BEFORE_90, 86: _BEFORE_90, 89: _BEFORE_90, 90: _FROM_90, 100: _FROM_90, 120: _BEFORE_90,
}  # fmt: skip


def bucket(M: int) -> int:
    """Index of the bucket of M, so that a batch size more does not mean another kernel."""
    return sum(M > largest for largest in BUCKETS)


def candidates(shape: Shape, arch: Arch) -> tuple[Config, ...]:
    """Legal rows of the table for this shape."""
    rows = TABLE[arch.capability][bucket(shape.M)]
    return tuple(row for row in rows if legal(row, shape, arch))


def measured(shape: Shape, arch: Arch) -> Config | None:
    """The legal config that was measured to be the fastest for about this shape, if any was."""
    rows = MEASURED.get(arch.capability, {}).get((shape.N, shape.K), ())
    config = next((Config(*row) for most, row in rows if shape.M <= most), None)
    return config if config is not None and legal(config, shape, arch) else None


def epilogue_name(
    activation: str, *, has_layer_scale: bool, has_residual: bool, quantizes: bool = False,
    is_float32: bool = False,
) -> str:  # fmt: skip
    """What follows a product, as tables name it: "gelu", "none+layer_scale+residual".

    Scales, zero points and bias are taken to be there always, and a result of 16 bits.
    """
    parts = {
        "layer_scale": has_layer_scale, "residual": has_residual, "quantized": quantizes,
        "float32": is_float32,
    }  # fmt: skip
    return "+".join([activation, *(name for name, is_there in parts.items() if is_there)])


LACKS = {
    "persistent": {"quantized", "float32"},
    "gluon": {"quantized", "float32", "residual", "layer_scale"},
}
"""Parts of an epilogue that a family does not do."""


def tuned_config(shape: Shape, arch: Arch, epilogue: str, gpu: str | None) -> Config | None:
    """The legal config that `lraee tune` found fastest for this layer on this GPU, if it did.

    A layer that multiplies its result by a vector (fc1 of a calibrated tower) takes the row of the
    same layer without, where it has none of its own.
    """
    row = None
    for name in (epilogue, epilogue.replace("+layer_scale", "")):
        if gpu is not None and row is None:
            row = tuned.row_of(gpu, shape.N, shape.K, shape.M, name)
    if row is None:
        return None
    config = Config(*row.config, family=row.family)
    lacks = LACKS.get(row.family, set()) & set(epilogue.split("+"))
    return config if not lacks and legal(config, shape, arch) else None


def unmeasured_config(shape: Shape, arch: Arch, epilogue: str, gpu: str | None) -> Config | None:
    """A config of a family that passed its check on this GPU, where the account predicts a gain.

    That is on sm_90, from one tile an SM on: products there have waits that warps of their own
    hide. What `lraee tune` measured comes before it.
    """
    parts = set(epilogue.split("+"))
    if gpu is None or arch.capability != first_use.CAPABILITY or LACKS["persistent"] & parts:
        return None
    config = persistent_config(arch, has_residual="residual" in parts)
    if math.ceil(shape.M / config.block_m) * math.ceil(shape.N / config.block_n) < arch.sms:
        return None
    is_used = first_use.has_passed("persistent", gpu) and legal(config, shape, arch)
    return config if is_used else None


@functools.lru_cache(maxsize=4096)
def pick(shape: Shape, arch: Arch, epilogue: str = "none", gpu: str | None = None) -> Config:
    """The config to launch: that of the user's table, of a family that passed its check at first
    use, of measured.py, or the model's choice.

    Args:
      epilogue: as epilogue_name has it; of use to the user's table alone.
      gpu: name of the GPU, whose table is read; None reads none.
    """
    config = (
        tuned_config(shape, arch, epilogue, gpu)
        or unmeasured_config(shape, arch, epilogue, gpu)
        or measured(shape, arch)
    )
    if config is not None:
        return config
    rows = candidates(shape, arch)
    assert rows, f"no legal config for {shape} on sm_{arch.capability}"
    return min(rows, key=lambda row: predicted_us(row, shape, arch))


@dataclass(frozen=True)
class PieceConfig:
    """Rows that one program quantizes in a launch that does more, block_k values at a time."""

    rows: int
    block_k: int


MOST_SPREAD_ROWS = 512
"""Up to here a program quantizes one row: as many at once as the GPU has room for."""
PIECE_VALUES = 64
"""Values that each thread holds."""


def piece_config(M: int, width: int, num_warps: int, group: int) -> PieceConfig:
    """Pieces of M float rows in a launch with num_warps; a piece lies within group rows.

    Rows of a piece are a power of two up to 16.
    """
    most = PIECE_VALUES * 32 * num_warps
    block_k = min(1 << (max(width, 16) - 1).bit_length(), most)
    if M <= MOST_SPREAD_ROWS:
        return PieceConfig(1, block_k)
    return PieceConfig(min(16, most // block_k, 1 << (group - 1).bit_length()), block_k)


def attention_config(
    L: int, d: int, causal: bool = False, *, has_mask: bool = False
) -> AttentionConfig:
    """int8_attention: 64 queries a program, or 16 where there are no more.

    By the image alone, never by the batch: how the threads of a program lie decides in which order
    they add up a row of probabilities. In 4 warps a causal mask spills on sm_80 and sm_86. A key
    mask spills on sm_100 in 4 warps, with 64 keys at once, and in two stages.
    """
    if L <= 16:
        return AttentionConfig(16, num_warps=4)
    num_warps = 8 if d > 64 or causal or has_mask else 4
    if has_mask:
        return AttentionConfig(64, num_warps, num_stages=1, unroll=32)
    return AttentionConfig(64, num_warps)


def float_attention_config(
    L: int, d: int, x_bytes: int, *, has_rope: bool = False
) -> FloatAttentionConfig:
    """float_attention: 64 queries a program, or 16 where there are no more.

    By the image alone, never by the batch: the order of sums is that of tiles and threads. Tiles of
    32 keys: with 64 both loops together spill on sm_86 and sm_89 and hold half the warps. float32,
    in three TF32 products, takes 16; 64 queries spill there on sm_80 with Triton 3.6.
    """
    block_i, num_warps = 64, 8 if has_rope and d > 96 else 4
    if x_bytes == 4:
        block_i, num_warps = 64 if 64 < d <= 80 else 32, 4 if d <= 64 else 8
    block_i = 16 if L <= 16 else block_i
    is_wide = x_bytes == 4
    return FloatAttentionConfig(block_i, 16 if is_wide else 32, num_warps, 1 if is_wide else 2)


def head_tiles(d: int) -> tuple[tuple[int, int], ...]:
    """(first channel, width) of the tiles that hold a head of d channels.

    Widths are powers of two of at least 16, the fewest channels that a product on tensor cores
    takes, and cover d with less than 16 channels of padding.
    """
    tiles, first = [], 0
    while first < d:
        width = max(16, 1 << ((d - first).bit_length() - 1))
        tiles.append((first, width))
        first += width
    return tuple(tiles)


def probe_config(B: int, arch: Arch) -> ProbeConfig:
    """exit_probe: an image by itself where there is no other, otherwise 16 images at a time.

    The former spills two registers in 4 warps on sm_90, in 8 warps on sm_100 and sm_120.
    """
    if B > 1:
        return ProbeConfig(rows=16)
    return ProbeConfig(rows=1, num_warps=8 if arch.capability == 90 else 4)
