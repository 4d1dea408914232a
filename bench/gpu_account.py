"""The account of a block: every launch with its bytes, products and predicted microseconds.

Three forms: `measured` as one H200 ran them (nine launches, int8 attention), `float` as launchers
make them now (float attention, row kernels in the input's type), `persistent` where the persistent
products are in use. The seven-launch form quantizes float rows in the launches that make them.
"""

import math
from dataclasses import dataclass

from bench import gpu_parts as constants
from bench.gpu_parts import Gpu
from bench.shapes import Tower
from lraee.kernels.configs import pick
from lraee.kernels.families import persistent_config
from lraee.kernels.tiling import Config, Shape

HALF = 2
"""Bytes of a float16 value."""


@dataclass(frozen=True)
class Cost:
    """One launch.

    Args:
      name: what it computes.
      us: predicted, the gap before it left out.
      size_bytes: every operand and result once.
      ops: on tensor cores, two for each multiply-add; in int8 but for float attention.
    """

    name: str
    us: float
    size_bytes: int
    ops: int = 0


@dataclass(frozen=True)
class Form:
    """How a block is computed.

    Args:
      has_float_attention, has_new_rows, is_persistent: which kernels.
      is_seven: rows are quantized in the launch that makes them.
    """

    name: str
    has_float_attention: bool = True
    has_new_rows: bool = True
    is_persistent: bool = False
    is_seven: bool = False


MEASURED = Form("measured", has_float_attention=False, has_new_rows=False)
FLOAT = Form("float")
PERSISTENT = Form("persistent", is_persistent=True)
SEVEN = Form("seven", is_seven=True)
FORMS = (MEASURED, FLOAT, PERSISTENT)


def norm_cost(gpu: Gpu, M: int, D: int, form: Form) -> Cost:
    """Norm and quantization of rows [M, D]."""
    size = HALF * M * D + 8 * D + M * (D + 8)
    instructions = constants.NORM_AFTER if form.has_new_rows else constants.NORM_BEFORE
    return Cost("norm", _row_us(gpu, instructions * M * D, size), size)


def quantize_cost(gpu: Gpu, M: int, K: int, D: int, form: Form) -> Cost:
    """Quantization of float rows [M, K]; D of them are the tower's width."""
    size = HALF * M * K + M * (K + 8)
    if form.has_new_rows:
        instructions = constants.QUANTIZE_AFTER * M * K
    else:
        of_value = constants.QUANTIZE_D_BEFORE if K == D else constants.QUANTIZE_4D_BEFORE
        instructions = of_value * M * (1 << (K - 1).bit_length())
    return Cost("quantize", _row_us(gpu, instructions, size), size)


def _row_us(gpu: Gpu, instructions: float, size_bytes: int) -> float:
    issue = instructions / gpu.value_issues_per_us
    return constants.ROW_START_US + max(issue, size_bytes / gpu.bytes_per_us)


def product_bytes(M: int, N: int, K: int, *, has_residual: bool) -> int:
    """int8 rows with scale and zero point, the weight with its vectors, float16 results."""
    return M * (K + 8) + N * (K + 12) + HALF * M * N * (2 if has_residual else 1)


def product_us(gpu: Gpu, shape: Shape, config: Config, instructions: float, size: int = 0) -> float:
    """The simple kernel: products or loads of tiles, then the epilogue, which they do not hide.

    size: bytes of operands and results, which memory must move in that time; 0 leaves them out.
    """
    M, N, K = shape.M, shape.N, shape.K
    row_blocks, columns = math.ceil(M / config.block_m), math.ceil(N / config.block_n)
    programs = row_blocks * columns * config.split_k
    fill = min(1.0, programs / gpu.sms)
    ops = 2 * row_blocks * config.block_m * columns * config.block_n * K
    compute = ops / (gpu.int8_tops * 1e6 * constants.INT8_UTILISATION * fill)
    tile_bytes = programs * (config.block_m + config.block_n) * K / config.split_k
    loads = tile_bytes / (gpu.tile_bytes_per_us * fill)
    epilogue = M * N * instructions / (gpu.value_issues_per_us * fill)
    start = constants.PRODUCT_START_US + (constants.SPLIT_US if config.split_k > 1 else 0.0)
    return start + max(max(compute, loads) + epilogue, size / gpu.bytes_per_us)


def persistent_us(gpu: Gpu, shape: Shape, config: Config, instructions: float, size: int) -> float:
    """The persistent kernel (assumed): whole waves of tiles, the epilogue behind the next tile."""
    M, N, K = shape.M, shape.N, shape.K
    block_m, block_n = config.block_m, config.block_n
    tiles = math.ceil(M / block_m) * math.ceil(N / block_n)
    waves = math.ceil(tiles / gpu.sms)
    ops = 2 * waves * gpu.sms * block_m * block_n * K
    compute = ops / (gpu.int8_tops * 1e6 * constants.INT8_UTILISATION)
    loads = waves * gpu.sms * (block_m + block_n) * K / gpu.tile_bytes_per_us
    epilogue = waves * gpu.sms * block_m * block_n * instructions / gpu.value_issues_per_us
    longer, shorter = sorted((max(compute, loads), epilogue), reverse=True)
    busy = longer + (1 - constants.OVERLAP) * shorter
    return constants.PERSISTENT_START_US + max(busy, size / gpu.bytes_per_us)


def product_cost(
    gpu: Gpu, name: str, shape: Shape, form: Form, *, has_gelu: bool, has_residual: bool
) -> Cost:
    """One linear with the tower's epilogue, in whichever kernel the form has and is faster."""
    M, N, K = shape.M, shape.N, shape.K
    parts = ["bias"] + ["residual"] * has_residual
    if has_gelu:
        parts.append("gelu_polynomial" if form.has_new_rows else "gelu_erf")
    instructions = constants.LIGHT_EPILOGUE + sum(constants.TOWER_EPILOGUE[p] for p in parts)
    size = product_bytes(M, N, K, has_residual=has_residual)
    us = product_us(gpu, shape, pick(shape, gpu.arch), instructions, size)
    if form.is_persistent:
        config = persistent_config(gpu.arch, has_residual=has_residual)
        us = min(us, persistent_us(gpu, shape, config, instructions, size))
    return Cost(name, us, size, 2 * M * N * K)


def attention_cost(gpu: Gpu, tower: Tower, batch: int, form: Form) -> Cost:
    """Attention: programs of 64 queries, four warps each, that go through the keys by 64."""
    L, D, H = tower.L, tower.D, tower.num_heads
    tiles = math.ceil(L / 64)
    programs = batch * H * tiles
    if form.has_float_attention:
        of_program = 4 * tiles * constants.FLOAT_ATTENTION_TILE
    else:
        of_program = 4 * tiles * (constants.INT8_ATTENTION_TILE + constants.INT8_ATTENTION_MEAN)
    rate = gpu.warp_issues_per_us * constants.ATTENTION_ISSUE
    # One program cannot use more than the SM that it is on
    busy = max(programs * of_program / rate, of_program / (rate / gpu.sms))
    size = HALF * 4 * batch * L * D
    name = "attention" if form.has_float_attention else "int8 attention"
    us = constants.ATTENTION_START_US + max(busy, size / gpu.bytes_per_us)
    return Cost(name, us, size, 4 * batch * L * L * D)


def block_costs(gpu: Gpu, tower: Tower, batch: int, form: Form) -> list[Cost]:
    """The launches of a block in order."""
    M, D = batch * tower.L, tower.D

    def linear(name: str, N: int, K: int, **parts: bool) -> Cost:
        options = {"has_gelu": False, "has_residual": False} | parts
        return product_cost(gpu, name, Shape(M, N, K), form, **options)

    attention = attention_cost(gpu, tower, batch, form)
    fc1 = linear("fc1", 4 * D, D, has_gelu=True)
    launches = [norm_cost(gpu, M, D, form), linear("qkv", 3 * D, D)]
    launches += _with_quantizing(gpu, attention, M, D, D, form)
    launches += [linear("out", D, D, has_residual=True), norm_cost(gpu, M, D, form)]
    launches += _with_quantizing(gpu, fc1, M, 4 * D, D, form)
    return [*launches, linear("fc2", D, 4 * D, has_residual=True)]


def _with_quantizing(gpu: Gpu, maker: Cost, M: int, K: int, D: int, form: Form) -> list[Cost]:
    quantize = quantize_cost(gpu, M, K, D, form)
    if not form.is_seven:
        return [maker, quantize]
    # Tickets are drawn, tiles arrive, pieces wait: four trips to L2 of 0.3 us, and the quantizing
    # programs have half the warps that a launch of their own would give them
    us = maker.us + 1.2 + 2 * (quantize.us - constants.ROW_START_US)
    size = maker.size_bytes + M * (K + 8)
    return [Cost(f"{maker.name}, quantized", us, size, maker.ops)]


def int8_us(gpu: Gpu, tower: Tower, batch: int, form: Form) -> float:
    """Microseconds of a whole tower, as a CUDA graph; each batch takes the fewer launches."""
    costs = block_costs(gpu, tower, batch, form)
    per_block = sum(cost.us + constants.GRAPH_GAP_US for cost in costs)
    return tower.layers * per_block + constants.OUTSIDE_US


def float16_costs(gpu: Gpu, tower: Tower, batch: int) -> list[Cost]:
    """torch in float16: cuBLAS with bias, fused attention, two norms, GELU, a sum not fused."""
    M, D, L = batch * tower.L, tower.D, tower.L

    def linear(name: str, N: int, K: int) -> Cost:
        tile = 64 if M <= 512 else 128
        fill = min(1.0, math.ceil(M / tile) * math.ceil(N / 128) / gpu.sms)
        compute = 2 * M * N * K / (gpu.fp16_tflops * 1e6 * constants.FP16_UTILISATION * fill)
        size = HALF * (M * K + N * K + M * N)
        us = constants.FP16_START_US + max(compute, size / gpu.elementwise_bytes_per_us)
        return Cost(name, us, size, 2 * M * N * K)

    def elementwise(name: str, size: int) -> Cost:
        return Cost(name, constants.FP16_START_US + size / gpu.elementwise_bytes_per_us, size)

    ops, size = 4 * batch * L * L * D, HALF * 4 * M * D
    rate = gpu.fp16_tflops * 1e6 * constants.FP16_ATTENTION_UTILISATION
    busy = max(ops / rate, size / gpu.elementwise_bytes_per_us)
    attention = Cost("attention", constants.FP16_START_US + busy, size, ops)
    return [
        elementwise("norm", 4 * M * D), linear("qkv", 3 * D, D), attention, linear("out", D, D),
        elementwise("norm", 4 * M * D), linear("fc1", 4 * D, D), elementwise("gelu", 16 * M * D),
        linear("fc2", D, 4 * D), elementwise("sum", 6 * M * D),
    ]  # fmt: skip


def float16_us(gpu: Gpu, tower: Tower, batch: int) -> float:
    """Microseconds of a whole tower of torch in float16, as a CUDA graph."""
    blocks = tower.layers * sum(cost.us for cost in float16_costs(gpu, tower, batch))
    if tower.patch_px == 32:
        first, more = constants.CUDNN_PATCHES_US
        return blocks + first + more * batch
    pixels = batch * 3 * tower.image_px**2
    return blocks + constants.FP16_OUTSIDE_US + 4 * pixels / gpu.elementwise_bytes_per_us
