"""GPUs of the account, and the constants that an H200's measured times were fitted with."""

from dataclasses import dataclass

from lraee.kernels.archs import ARCHS, Arch


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU from its datasheet (dense), at its boost clock; arch decides configs."""

    name: str
    arch: Arch
    sms: int
    clock_ghz: float
    int8_tops: float
    fp16_tflops: float
    bandwidth_gb_s: float

    @property
    def warp_issues_per_us(self) -> float:
        """Instructions of a warp: one per scheduler and cycle, four schedulers an SM."""
        return self.sms * 4 * self.clock_ghz * 1e3

    @property
    def value_issues_per_us(self) -> float:
        """Instructions of a value, 32 to a warp."""
        return 32 * self.warp_issues_per_us

    @property
    def bytes_per_us(self) -> float:
        """Of memory, at three quarters of the datasheet's."""
        return 0.75 * self.bandwidth_gb_s * 1e3

    @property
    def elementwise_bytes_per_us(self) -> float:
        """What torch's elementwise kernels move: see ELEMENTWISE_BYTES."""
        return min(self.bytes_per_us, self.sms * self.clock_ghz * 1e3 * ELEMENTWISE_BYTES)

    @property
    def tile_bytes_per_us(self) -> float:
        """What products load from L2: see TILE_BYTES; no more than 2.1 times what `arch` has."""
        by_sm = self.sms * self.clock_ghz * 1e3 * TILE_BYTES
        return min(by_sm, L2_FACTOR * self.arch.l2_gb_s * 1e3)


GPUS = (
    Gpu("A100", ARCHS[80], 108, 1.41, 624, 312, 1555),
    Gpu("L4", ARCHS[89], 58, 2.04, 242, 121, 300),
    Gpu("H100", ARCHS[90], 132, 1.755, 1979, 989, 3350),
    Gpu("H200", ARCHS[90], 132, 1.755, 1979, 989, 4800),
)
H200 = GPUS[-1]

# Fitted to the products of bench/gpu_products.py (32 times, light epilogue): within 25 %, 12 % as a
# root mean square

PRODUCT_START_US = 2.6
"""Of a product: to launch it, fill its pipeline, and drain."""
SPLIT_US = 2.5
"""More where K is split: partial sums go to L2 and come back."""
INT8_UTILISATION = 0.50
"""Of peak, of the simple kernel, whose products wait for each other (no int8 wgmma overlaps)."""
TILE_BYTES = 50.0
"""Bytes that an SM loads of tiles in a cycle; 64 are the peak."""
L2_FACTOR = 2.1
"""How much more than a plain L2 read the tiles of neighbours reach together."""
LIGHT_EPILOGUE = 36.0
"""Instructions a value of scales and the store, which nothing overlaps in the simple kernel."""

# From compiled code (instructions a value or a warp); row kernels take 1 us at least

TOWER_EPILOGUE = {"bias": 8.0, "residual": 8.0, "gelu_erf": 40.0, "gelu_polynomial": 20.0}
ROW_START_US = 1.0
NORM_BEFORE, NORM_AFTER = 92.0, 52.0
QUANTIZE_D_BEFORE, QUANTIZE_4D_BEFORE = 58.0, 42.0
"""A value of a row that is padded to a power of two."""
QUANTIZE_AFTER = 29.0
INT8_ATTENTION_TILE, INT8_ATTENTION_MEAN = 1660.0, 578.0
"""Instructions a warp: for 64 queries and 64 keys, and for the mean of K over 64 tokens."""
FLOAT_ATTENTION_TILE = 369.0

# Fitted to the 12 INT8 rows of one H200 (docs/gpu.md): 6 % as a root mean square, 16 % at most

ATTENTION_START_US = 2.0
ATTENTION_ISSUE = 0.55
"""Of the issue slots, in attention."""
GRAPH_GAP_US = 2.17
"""Between two launches of a graph that depend on each other."""
OUTSIDE_US = 20.0
"""What is no block: patches, positions, the last norm and projection, and the copies."""

# Fitted to the 12 float16 rows (torch as a CUDA graph): 5 %, 10 % at most

FP16_START_US = 3.3
FP16_UTILISATION = 0.76
FP16_ATTENTION_UTILISATION = 0.33
ELEMENTWISE_BYTES = 7.5
"""Bytes that an SM moves in a cycle in norms, GELU and sums."""
FP16_OUTSIDE_US = 70.0
CUDNN_PATCHES_US = (298.0, 3.9)
"""Of ViT-B/32's patch embedding by cuDNN, and a microsecond an image more: measured."""

# Assumptions: no GPU has run these

PERSISTENT_START_US = 3.0
OVERLAP = 0.75
"""Share of the shorter of products and epilogue that a persistent kernel hides behind the other."""
PROBE_CHAIN_US = 4.5
"""15 trips to L2 of 0.3 us: the parts of a probe wait for each other."""
DECIDE_US = 2.0
