"""The operators `torch.ops.lraee.*`, their arguments checked: see lraee.ops.checked."""

from lraee.kernels.operands import BlockOperands, Norm, PackedLinear, ProbeHead
from lraee.ops.checked import (
    Activation,
    GateActivation,
    exit_probe,
    float_attention,
    float_linear,
    gated_quantize,
    int8_attention,
    int8_block,
    int8_linear,
    layer_norm_quantize,
    pack_weight,
    quantize_rows,
    unpack_weight,
)

__all__ = [
    "Activation", "BlockOperands", "GateActivation", "Norm", "PackedLinear", "ProbeHead",
    "exit_probe", "float_attention", "float_linear", "gated_quantize", "int8_attention",
    "int8_block", "int8_linear", "layer_norm_quantize", "pack_weight", "quantize_rows",
    "unpack_weight",
]  # fmt: skip
