"""PREDICTION of GPU times: nothing here was measured. Per launch max(compute, memory, launch).

    python -m bench.gpu_model

Times follow from datasheet peaks (dense) and the utilisations below, which are assumptions: large
INT8 products in Triton at 45 % of peak and cuBLAS FP16 at 70 % (published figures for A100 and Ada
lie at 45-50 % and 65-80 %), less on tiles that are not full; memory at 75 %. Launches, and the
bytes and products of each, are those that the launchers would make (bench/launches.py).
Two launch costs are shown: 5 us each (eager) and 1.5 us (replayed from a CUDA graph). An H200 took
1.8 to 3.4 times these times for INT8 and 1.0 to 3.7 times for FP16 (bench/NOTES.md, "a first GPU"):
they serve to compare designs, not to promise. All blocks count whole: what the last one leaves out
is 3 to 6 % of the products.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.launches import Launch, launches_of, meta
from bench.shapes import B16, B32, L14, Tower
from lraee.kernels import configs
from lraee.kernels.archs import ARCHS, Arch
from lraee.kernels.configs import Shape, attention_config, pick
from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.int8_linear import int8_linear, int8_linear_from_float
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows

INT8_UTILISATION, FP16_UTILISATION, MEMORY_UTILISATION = 0.45, 0.70, 0.75
LAUNCH_US = {"eager": 5.0, "graph": 1.5}
SHORTEST_US = 2.0
"""A kernel that does next to nothing: filling and draining the GPU."""
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


def _weight(N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return meta(N, K, dtype=torch.int8), meta(N), meta(N, dtype=torch.int32), meta(N)


def block_launches(
    tower: Tower, batch: int, arch: Arch, *, quantizes_together: bool | None = None
) -> list[Launch]:
    """The launches of one INT8 block in float16.

    Nine, or seven where out and fc2 quantize their float rows (int8_linear_from_float): where
    towers do (configs.quantizes_together), or as the argument says.
    """
    M, D = batch * tower.L, tower.D
    half = torch.float16
    x, gamma, beta = meta(M, D, dtype=half), meta(D), meta(D)
    is_together = quantizes_together
    if is_together is None:
        is_together = configs.quantizes_together(M, arch)

    def linear(N: int, K: int, activation: str, residual: Tensor | None) -> None:
        x_q, x_zero = meta(M, K, dtype=torch.int8), meta(M, dtype=torch.int32)
        int8_linear(
            x_q, meta(M), x_zero, *_weight(N, K), activation=activation, residual=residual,
            out_dtype=half, config=pick(Shape(M, N, K), arch),
        )  # fmt: skip

    def linear_of_float(N: int, K: int) -> None:
        rows = meta(M, K, dtype=half)
        if is_together:
            int8_linear_from_float(
                rows, False, *_weight(N, K), residual=x, out_dtype=half,
                config=pick(Shape(M, N, K), arch),
            )  # fmt: skip
        else:
            quantize_rows(rows, False)
            linear(N, K, "none", x)

    def block() -> None:
        heads = tower.num_heads
        layer_norm_quantize(x, gamma, beta, 1e-5, False)
        linear(3 * D, D, "none", None)
        config = attention_config(tower.L, D // heads)
        int8_attention(meta(batch, tower.L, 3 * D, dtype=half), heads, config=config)
        linear_of_float(D, D)
        layer_norm_quantize(x, gamma, beta, 1e-5, False)
        linear(4 * D, D, "gelu", None)
        linear_of_float(D, 4 * D)

    return launches_of(block)


def probe_launches(tower: Tower, batch: int, *, has_class_token: bool = False) -> list[Launch]:
    """The launches of one exit probe: the paper's head D -> D -> E, or 2 D -> 512 -> E."""
    D, E = tower.D, tower.E
    P, H = (2 * D, HIDDEN) if has_class_token else (D, D)
    z, gamma, beta = meta(batch, tower.L, D, dtype=torch.float16), meta(P), meta(P)
    classes = meta(CLASSES, E, dtype=torch.float16)
    return launches_of(
        lambda: exit_probe(
            z, gamma, beta, 1e-5, *_weight(H, P), *_weight(E, H), classes, 100.0, meta(4)
        )
    )


def bytes_of(launch: Launch) -> int:
    """Every tensor argument read or written once; a workspace is not counted.

    An absent argument is replaced by one that is there (kernels), so each storage counts once.
    """
    seen: dict[int, int] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor) and name not in ("partial_ptr", "ticket_ptr"):
            seen[id(value)] = value.numel() * value.element_size()
    return sum(seen.values())


def products_of(launch: Launch, tower: Tower) -> int:
    """Operations (two per multiply-add) that a launch gives to tensor cores."""
    given = launch.arguments

    def number(name: str) -> int:
        value = given[name]
        assert isinstance(value, int)
        return value

    if launch.name == "int8_linear":
        return 2 * number("M") * number("N") * number("K")
    if launch.name == "int8_attention":
        queries = number("asked")
        heads = launch.programs // math.ceil(queries / int(str(launch.constants["BLOCK_I"])))
        return 4 * heads * queries * number("L") * number("d")
    if launch.name == "score":
        return 2 * launch.programs * 16 * number("H") * number("E")
    return 0


def fill(launch: Launch, part: Part) -> float:
    """Share of the SMs in use on average: the last wave is seldom full."""
    waves = math.ceil(launch.programs / part.sms)
    return launch.programs / (waves * part.sms)


def kernel_us(launch: Launch, part: Part, tower: Tower) -> float:
    """PREDICTION for one launch, its launch cost apart."""
    peak = part.fp16_tflops if launch.name == "int8_attention" else part.int8_tops
    utilisation = INT8_UTILISATION * max(fill(launch, part), 0.05)
    compute = products_of(launch, tower) / (peak * 1e6 * utilisation)
    memory = bytes_of(launch) / (part.bandwidth_gb_s * 1e3 * MEMORY_UTILISATION)
    alone = max(SHORTEST_US, compute, memory, _score_us(launch, part))
    return alone + together_us(launch, part)


def together_us(launch: Launch, part: Part) -> float:
    """What programs take that quantize rows together before their product, per wave.

    Two trips to L2 to meet, and for each piece one to take it, one to load it, its bytes (read
    twice where it is no single tile) and its instructions.
    """
    if not launch.constants.get("FROM_FLOAT"):
        return 0.0

    def constant(name: str) -> int:
        return int(str(launch.constants[name]))

    M, N, K = (int(str(launch.arguments[name])) for name in ("M", "N", "K"))
    rows = min(M, constant("BLOCK_M"))
    sharers = math.ceil(N / constant("BLOCK_N")) * constant("SPLIT_K")
    pieces = math.ceil(math.ceil(rows / constant("PIECE_ROWS")) / sharers)
    values = min(rows, constant("PIECE_ROWS")) * K
    readings = 1 if launch.constants["IS_ONE_TILE"] else 2
    piece = (
        2 * configs.LOAD_LATENCY_US
        + values * (2 * readings + 1) / (SM_GB_S * 1e3)
        + values * QUANTIZE_INSTRUCTIONS / SM_INSTRUCTIONS_PER_US
    )
    waves = math.ceil(launch.programs / part.sms)
    return waves * (2 * configs.LOAD_LATENCY_US + pieces * piece)


def _score_us(launch: Launch, part: Part) -> float:
    """The last launch of the probe waits for what each program reads by itself: W2, its classes."""
    if launch.name != "score":
        return 0.0
    H, E, classes = (int(str(launch.arguments[name])) for name in ("H", "E", "CLASSES"))
    waves = math.ceil(launch.programs / part.sms)
    return waves * (H * E + 2 * classes * E) / (SM_GB_S * 1e3)


def int8_us(launches: list[Launch], part: Part, tower: Tower, mode: str) -> float:
    """PREDICTION for a run of launches: launching hides behind kernels, or sets the pace."""
    return sum(max(kernel_us(one, part, tower), LAUNCH_US[mode]) for one in launches)


def fp16_block_us(tower: Tower, batch: int, part: Part, mode: str) -> float:
    """PREDICTION for one FP16 block: cuBLAS GEMMs, fused attention, the rest bound by memory."""
    M, D, L = batch * tower.L, tower.D, tower.L
    bandwidth = part.bandwidth_gb_s * 1e3 * MEMORY_UTILISATION
    rate = part.fp16_tflops * 1e6 * FP16_UTILISATION
    times = []
    for linear in tower.linears:
        tile = 64 if M <= 256 else 128
        tiles = math.ceil(M / tile) * math.ceil(linear.N / tile)
        waves = math.ceil(tiles / part.sms)
        share = max(tiles / (waves * part.sms), 0.05)
        compute = 2 * M * linear.N * linear.K / (rate * share)
        memory = 2 * (M * linear.K + linear.N * linear.K + M * linear.N) / bandwidth
        times.append(max(compute, memory))
    times.append(max(4 * batch * L * L * D / rate, 2 * 4 * M * D / bandwidth))
    times += [4 * M * D / bandwidth] * 2 + [16 * M * D / bandwidth, 6 * M * D / bandwidth]
    assert len(times) == FP16_LAUNCHES_PER_BLOCK
    return sum(max(SHORTEST_US, LAUNCH_US[mode], time) for time in times)


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
                    int8 = tower.layers * int8_us(block, part, tower, mode)
                    fp16 = tower.layers * fp16_block_us(tower, batch, part, mode)
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
