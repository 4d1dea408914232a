"""Each operator in plain torch: the definition that every implementation is proven against.

Integers (x_q, x_zero, accumulators) and everything written with +, -, *, / and sqrt alone are
matched bit for bit by the C++ implementations; exp, erf, tanh and the P @ V product are matched
within a derived bound. Rounding is half to even, division is true division, and no product is
fused with a sum.
"""

from lraee.ops.reference.attention import (
    FIXED_POINT_KEYS,
    LARGEST_VALUE,
    LARGEST_WEIGHT,
    float_attention,
    int8_attention,
)
from lraee.ops.reference.block import int8_block
from lraee.ops.reference.gated import GatedRows, gated_quantize
from lraee.ops.reference.linear import (
    MAX_K,
    activate,
    float_linear,
    int8_linear,
    pack_weight,
    unpack_weight,
)
from lraee.ops.reference.probe import Probe, exit_probe, pool, top_two
from lraee.ops.reference.rows import (
    LANES,
    SMALLEST_SCALE,
    Quantized,
    lane_sum,
    layer_norm,
    layer_norm_quantize,
    quantize_rows,
    steady_sigmoid,
)

__all__ = [
    "FIXED_POINT_KEYS", "LANES", "LARGEST_VALUE", "LARGEST_WEIGHT", "MAX_K", "SMALLEST_SCALE",
    "GatedRows", "Probe", "Quantized", "activate", "exit_probe", "float_attention",
    "float_linear", "gated_quantize", "int8_attention", "int8_block", "int8_linear", "lane_sum",
    "layer_norm", "layer_norm_quantize", "pack_weight", "pool", "quantize_rows", "steady_sigmoid",
    "top_two", "unpack_weight",
]  # fmt: skip
