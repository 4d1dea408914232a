"""PREDICTION of GPU times: nothing here was measured. Per launch max(compute, memory, launch).

    python -m bench.gpu_model

Times follow from datasheet peaks (dense) and the utilisations below, which are assumptions: large
INT8 products in Triton at 45 % of peak and cuBLAS FP16 at 70 % (published figures for A100 and Ada
lie at 45-50 % and 65-80 %), less on tiles that are not full; memory at 75 %. Launches, and the
bytes and products of each, are those that the launchers would make (bench/launches.py).
Two launch costs are shown: 5 us each (eager) and 1.5 us (replayed from a CUDA graph). An H200 took
1.8 to 3.4 times these times for INT8 and 1.0 to 3.7 times for FP16 (docs/notes/gpu.md):
they serve to compare designs, not to promise. All blocks count whole: what the last one leaves out
is 3 to 6 % of the products.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.launches import Launch, launches_of, meta, meta_linear
from bench.shapes import B16, B32, L14, Tower
from lraee.kernels.archs import ARCHS, Arch
from lraee.kernels.configs import Shape, attention_config, pick
from lraee.kernels.exit_probe import TILE_N, exit_probe
from lraee.kernels.int8_attention import int8_attention, int8_attention_quantized
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.operands import AttentionOperands, Norm, ProbeHead
from lraee.kernels.quantize_rows import quantize_rows

INT8_UTILISATION, FP16_UTILISATION, MEMORY_UTILISATION = 0.45, 0.70, 0.75
LAUNCH_US = {"eager": 5.0, "graph": 1.5}
BOUNDARY_US = 1.0
"""Between two launches that depend on each other: draining the GPU and filling it again."""
SHORTEST_US = 1.0
"""What a kernel takes at least between two boundaries: one load, and one store."""
L2_TRIP_US = 0.3
"""To L2 and back for a ticket, or a load of what lies there, with a barrier: about two L2 hits.

A hit takes 222 to 339 cycles on an L40 (arXiv 2606.22588), 0.1 us, and some 0.15 us on an A100.
"""
SM_GB_S = 80.0
"""What one SM reads from L2: 64 bytes a cycle at some 1.4 GHz, not quite reached."""
SM_INSTRUCTIONS_PER_US = 128 * 1.5e3
"""Values that one SM gives an instruction: one of a warp per scheduler and cycle, at ~1.5 GHz."""
QUANTIZE_INSTRUCTIONS = 32
"""About what a value takes: 8 in the search for the range of its row, 24 to be quantized."""
BATCHES = (1, 8, 32, 128)
CLASSES = 1000
HIDDEN = 512
"""Hidden values of a head that sees the class token beside the patch mean."""
FP16_LAUNCHES_PER_BLOCK = 9
"""2 LayerNorm, 4 GEMM (bias inside), attention, GELU, and one residual that is not fused."""


@dataclass(frozen=True)
class Part:
    """Peaks of one GPU, from its datasheet; arch decides configs."""

    name: str
    arch: Arch
    sms: int
    int8_tops: float
    fp16_tflops: float
    bandwidth_gb_s: float


PARTS = (
    Part("A100", ARCHS[80], 108, 624, 312, 1555),
    Part("L4", ARCHS[89], 58, 242, 121, 300),
    Part("RTX 4090", ARCHS[89], 128, 660, 330, 1008),
    Part("H100", ARCHS[90], 132, 1979, 989, 3350),
)


def block_launches(tower: Tower, batch: int, arch: Arch, *, is_fused: bool = True) -> list[Launch]:
    """The launches of one INT8 block in float16: seven, as int8_block makes them.

    Nine where not is_fused: attention and fc1 leave float rows, which quantize_rows reads again.
    """
    M, D = batch * tower.L, tower.D
    half = torch.float16
    x, gamma, beta = meta(M, D, dtype=half), meta(D), meta(D)

    def linear(N: int, K: int, residual: Tensor | None, activation: str = "none") -> None:
        given = (
            meta(M, K, dtype=torch.int8),
            meta(M),
            meta(M, dtype=torch.int32),
            meta_linear(N, K),
        )
        options = {"activation": activation, "config": pick(Shape(M, N, K), arch)}
        if activation == "none":
            int8_linear(*given, residual=residual, out_dtype=half, **options)
        elif is_fused:
            int8_linear_quantized(*given, symmetric=False, out_dtype=half, **options)
        else:
            quantize_rows(int8_linear(*given, out_dtype=half, **options), False)

    def attention() -> None:
        heads = tower.num_heads
        config = attention_config(tower.L, D // heads)
        qkv = meta(batch, tower.L, 3 * D, dtype=half)
        if is_fused:
            int8_attention_quantized(qkv, AttentionOperands(heads), symmetric=False, config=config)
        else:
            quantize_rows(int8_attention(qkv, heads, config=config).flatten(0, 1), False)

    def block() -> None:
        layer_norm_quantize(x, gamma, beta, 1e-5, False)
        linear(3 * D, D, None)
        attention()
        linear(D, D, x)
        layer_norm_quantize(x, gamma, beta, 1e-5, False)
        linear(4 * D, D, None, "gelu")
        linear(D, 4 * D, x)

    return launches_of(block)


def probe_launches(tower: Tower, batch: int, *, has_class_token: bool = False) -> list[Launch]:
    """The launch of one exit probe: the paper's head D -> D -> E, or 2 D -> 512 -> E."""
    D, E = tower.D, tower.E
    P, H = (2 * D, HIDDEN) if has_class_token else (D, D)
    z, norm = meta(batch, tower.L, D, dtype=torch.float16), Norm(meta(P), meta(P))
    classes = meta(CLASSES, E, dtype=torch.float16)
    return launches_of(
        lambda: exit_probe(
            z, ProbeHead(norm, meta_linear(H, P), meta_linear(E, H), classes, 100.0, meta(4))
        )
    )


def bytes_of(launch: Launch) -> int:
    """Every tensor argument read or written once; a workspace is not counted.

    An absent argument is replaced by one that is there (kernels), so each storage counts once.
    """
    recorded: dict[int, int] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor) and name not in ("partial_ptr", "ticket_ptr"):
            recorded[id(value)] = value.numel() * value.element_size()
    return sum(recorded.values())


def _number(launch: Launch, name: str) -> int:
    value = launch.arguments[name] if name in launch.arguments else launch.constants[name]
    assert isinstance(value, int)
    return value


def products_of(launch: Launch, tower: Tower) -> int:
    """Operations (two per multiply-add) that a launch gives to tensor cores."""
    if launch.name == "int8_linear":
        return 2 * math.prod(_number(launch, name) for name in "MNK")
    if launch.name == "int8_attention":
        return 4 * math.prod(_number(launch, name) for name in ("B", "H", "num_queries", "L", "d"))
    if launch.name == "exit_probe":
        P, H, E = (_number(launch, name) for name in "PHE")
        blocks = math.ceil(_number(launch, "B") / _number(launch, "ROWS"))
        return 2 * 16 * blocks * H * (P + E)
    return 0


def quantized_rows(launch: Launch) -> tuple[int, int, int]:
    """Rows that a launch quantizes after its tiles, their width, and programs that do it."""
    if not launch.constants.get("QUANTIZES"):
        return 0, 0, 0
    if launch.name == "int8_linear":
        M, N = _number(launch, "M"), _number(launch, "N")
        return M, N, math.ceil(M / _number(launch, "PIECE_ROWS"))
    B, num_queries = _number(launch, "B"), _number(launch, "num_queries")
    width = _number(launch, "H") * _number(launch, "d")
    return B * num_queries, width, B * math.ceil(num_queries / _number(launch, "PIECE_ROWS"))


def kernel_us(launch: Launch, part: Part, tower: Tower) -> float:
    """PREDICTION for one launch, its launch cost apart."""
    M, width, pieces = quantized_rows(launch)
    programs = launch.programs - pieces
    waves = math.ceil(programs / part.sms)
    fill = programs / (waves * part.sms)  # the last wave is seldom full
    peak = part.fp16_tflops if launch.name == "int8_attention" else part.int8_tops
    utilisation = INT8_UTILISATION * max(fill, 0.05)
    compute = products_of(launch, tower) / (peak * 1e6 * utilisation)
    quantized_bytes = M * (width + 8)
    memory = (bytes_of(launch) - quantized_bytes) / _bytes_per_us(part)
    if launch.name == "quantize_rows":
        compute = _quantizing_us(math.prod(_number(launch, name) for name in "MK"), part)
    us = BOUNDARY_US + max(SHORTEST_US, compute, memory)
    if launch.name == "exit_probe":
        return us + _chain_us(launch, part)
    if not M:
        return us
    # A ticket for each program; then tiles arrive, and pieces see that, load, and quantize
    again = (quantized_bytes + 2 * M * width) / _bytes_per_us(part)
    return us + (waves + 3) * L2_TRIP_US + max(again, _quantizing_us(M * width, part, pieces))


def _bytes_per_us(part: Part) -> float:
    return part.bandwidth_gb_s * 1e3 * MEMORY_UTILISATION


def _quantizing_us(values: int, part: Part, programs: int | None = None) -> float:
    """Time of the instructions that quantize values in this many programs; all SMs when None."""
    sms = part.sms if programs is None else min(part.sms, programs)
    return values * QUANTIZE_INSTRUCTIONS / (SM_INSTRUCTIONS_PER_US * sms)


TRIPS_OF_PROBE = 15
"""Of one image through exit_probe: a ticket; the last channels arrive, read the row and arrive; a
tile of the head sees that, reads, is the last to arrive, reads hidden and arrives; a tile of the
embedding sees that, reads and arrives; a part sees that, reads, is the last to arrive, and reads
the others' (14, and one more for variance).
"""


def _chain_us(launch: Launch, part: Part) -> float:
    """What the parts of a probe add to its slowest resource, for each waits for the one before:
    trips to L2, and what a program reads of weights and classes by itself.
    """
    P, H, E, classes = (_number(launch, name) for name in ("P", "H", "E", "CLASSES"))
    waves = math.ceil(launch.programs / part.sms)
    read = int(TILE_N) * (P + H) + 2 * classes * E
    return TRIPS_OF_PROBE * L2_TRIP_US + waves * read / (SM_GB_S * 1e3)


def int8_us(launches: list[Launch], part: Part, tower: Tower, mode: str) -> float:
    """PREDICTION for a run of launches: launching hides behind kernels, or sets the pace."""
    return sum(max(kernel_us(one, part, tower), LAUNCH_US[mode]) for one in launches)


def _fp16_product_us(M: int, N: int, K: int, part: Part) -> float:
    tile = 64 if M <= 256 else 128
    tiles = math.ceil(M / tile) * math.ceil(N / tile)
    waves = math.ceil(tiles / part.sms)
    share = max(tiles / (waves * part.sms), 0.05)
    compute = 2 * M * N * K / (part.fp16_tflops * 1e6 * FP16_UTILISATION * share)
    return max(compute, 2 * (M * K + N * K + M * N) / _bytes_per_us(part))


def _sum_us(times: list[float], mode: str) -> float:
    return sum(max(BOUNDARY_US + max(SHORTEST_US, time), LAUNCH_US[mode]) for time in times)


def fp16_block_us(tower: Tower, batch: int, part: Part, mode: str) -> float:
    """PREDICTION for one FP16 block: cuBLAS GEMMs, fused attention, the rest bound by memory."""
    M, D, L = batch * tower.L, tower.D, tower.L
    bandwidth = _bytes_per_us(part)
    rate = part.fp16_tflops * 1e6 * FP16_UTILISATION
    times = [_fp16_product_us(M, linear.N, linear.K, part) for linear in tower.linears]
    times.append(max(4 * batch * L * L * D / rate, 2 * 4 * M * D / bandwidth))
    times += [4 * M * D / bandwidth] * 2 + [16 * M * D / bandwidth, 6 * M * D / bandwidth]
    assert len(times) == FP16_LAUNCHES_PER_BLOCK
    return _sum_us(times, mode)


def outside_us(tower: Tower, batch: int, part: Part, mode: str) -> float:
    """PREDICTION for what is no block, in FP16 with INT8 blocks too: patches side by side, their
    product, class token and positions, first norm; final norm of the class token, projection.
    """
    patches, K = batch * (tower.L - 1), 3 * tower.patch_px**2
    M, D, bandwidth = batch * tower.L, tower.D, _bytes_per_us(part)
    times = [4 * patches * K / bandwidth, _fp16_product_us(patches, D, K, part)]
    times += [4 * M * D / bandwidth, 6 * M * D / bandwidth, 4 * M * D / bandwidth]
    times += [4 * batch * D / bandwidth, _fp16_product_us(batch, tower.E, D, part)]
    return _sum_us(times, mode)


def rows(towers: tuple[Tower, ...] = (B32, B16, L14)) -> Iterator[dict[str, object]]:
    """One PREDICTION per GPU, tower, batch and way of launching.

    probe_share: one probe that sees the class token, of the whole INT8 tower.
    """
    for part in PARTS:
        for tower in towers:
            for batch in BATCHES:
                block = block_launches(tower, batch, part.arch)
                probe = probe_launches(tower, batch, has_class_token=True)
                for mode in LAUNCH_US:
                    outside = outside_us(tower, batch, part, mode)
                    int8 = outside + tower.layers * int8_us(block, part, tower, mode)
                    fp16 = outside + tower.layers * fp16_block_us(tower, batch, part, mode)
                    share = int8_us(probe, part, tower, mode) / int8
                    yield {
                        "gpu": part.name, "tower": tower.name, "batch": batch, "launch": mode,
                        "int8_ms": int8 / 1e3, "fp16_ms": fp16 / 1e3, "ratio": fp16 / int8,
                        "probe_share": share,
                    }  # fmt: skip


def main() -> None:
    """Prints the table."""
    print("PREDICTION from datasheets and assumed utilisation, not a measurement")
    print(
        f"{'GPU':9} {'tower':9} {'batch':>5} {'launch':6} {'INT8':>9} {'FP16':>9} FP16/INT8 probe"
    )
    for row in rows():
        print(
            f"{row['gpu']:9} {row['tower']:9} {row['batch']:5} {row['launch']:6}"
            f" {row['int8_ms']:6.2f} ms {row['fp16_ms']:6.2f} ms {row['ratio']:8.2f}x"
            f" {row['probe_share']:5.1%}  PREDICTION"
        )


if __name__ == "__main__":
    main()
