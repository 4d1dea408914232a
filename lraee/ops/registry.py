"""Schema, definition, fake and FLOP formula of each operator `torch.ops.lraee.*`.

PyTorch's dispatcher is the registry of implementations: C++ for CPU tensors (lraee._C), Triton for
CUDA tensors (lraee.kernels), and the plain-torch definition (lraee.ops.reference) wherever neither
is there. Schemas are flat; all below them takes records (lraee.kernels.operands).
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from lraee.kernels import register
from lraee.kernels.operands import BlockOperands, PackedLinear, ProbeHead, from_schema
from lraee.ops import reference
from lraee.ops.reference import GatedRows, Probe, Quantized

F = TypeVar("F", bound=Callable[..., object])

PANEL_N, GROUP_K = 16, 4
"""CPU weight layout [ceil(N/16), ceil(K/4), 16, 4]: one 64-byte register per panel and k-group."""

try:
    from lraee import _C  # noqa: F401  (registers the CPU implementations)

    CPU_EXTENSION_ERROR: str | None = None
except ImportError as error:
    CPU_EXTENSION_ERROR = str(error)
    logging.getLogger("lraee").warning(
        "C++ extension not available (%s): operators on the CPU run the slow plain-torch reference",
        error,
    )

SCHEMAS = {
    "quantize_rows": "(Tensor x, bool symmetric) -> (Tensor x_q, Tensor x_scale, Tensor x_zero)",
    "layer_norm_quantize": "(Tensor x, Tensor gamma, Tensor? beta, float eps, bool symmetric)"
    " -> (Tensor x_q, Tensor x_scale, Tensor x_zero)",
    "pack_weight": "(Tensor w_q) -> (Tensor w, Tensor w_sum)",
    "unpack_weight": "(Tensor w, int N, int K) -> Tensor",
    "int8_linear": "(Tensor x_q, Tensor x_scale, Tensor? x_zero, Tensor w, Tensor w_scale,"
    " Tensor w_sum, Tensor? bias=None, *, Tensor? residual=None, Tensor? layer_scale=None,"
    ' str activation="none", ScalarType out_dtype=float) -> Tensor',
    "float_linear": "(Tensor x, Tensor w, Tensor? bias=None) -> Tensor",
    "gated_quantize": "(Tensor x, str activation, Tensor? gamma=None, Tensor? beta=None,"
    " float eps=0.0) -> (Tensor x_q, Tensor x_scale, Tensor x_zero, Tensor r_q, Tensor r_scale)",
    "int8_attention": "(Tensor qkv, int num_heads, bool causal=False, Tensor? rope=None,"
    " Tensor? key_mask=None) -> Tensor",
    "float_attention": "(Tensor qkv, int num_heads, bool causal=False, Tensor? rope=None,"
    " Tensor? key_mask=None) -> Tensor",
    "int8_block": "(Tensor x, Tensor[] norm_1, Tensor?[] in_proj, Tensor?[] out_proj,"
    " Tensor[] norm_2, Tensor?[] c_fc, Tensor?[] c_proj, float[] eps, bool[4] symmetric,"
    " int num_heads, bool causal, str activation, bool first_only=False,"
    ' Tensor? key_mask=None, str attention="int8") -> Tensor',
    "exit_probe": "(Tensor z, Tensor gamma, Tensor beta, float eps, Tensor w1, Tensor w1_scale,"
    " Tensor w1_sum, Tensor? b1, Tensor? w2, Tensor? w2_scale, Tensor? w2_sum, Tensor? b2,"
    " Tensor classes, float logit_scale, Tensor gate) -> (Tensor embedding, Tensor top1,"
    " Tensor confidence, Tensor margin, Tensor variance, Tensor score)",
}
OPERATORS = tuple(SCHEMAS)

_library = Library("lraee", "DEF")  # type: ignore[no-untyped-call]
DEFINITIONS: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in SCHEMAS}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    _impl = from_schema(_name, DEFINITIONS[_name])
    _library.impl(_name, _impl, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

TRITON_ERROR: str | None = register.register(_library, DEFINITIONS)
"""Why no Triton kernel is registered for CUDA tensors, or None."""


def packed_shape(N: int, K: int, device: torch.device) -> list[int]:
    """Shape of the int8 weight layout that the device's implementation reads."""
    if device.type == "cpu" and CPU_EXTENSION_ERROR is None:
        return [-(-N // PANEL_N), -(-K // GROUP_K), PANEL_N, GROUP_K]
    return [N, K]


# Fakes: shape, type and device of each result


def _fake(name: str) -> Callable[[F], F]:
    def register(fake: F) -> F:
        register_fake(f"lraee::{name}", from_schema(name, fake), lib=_library)
        return fake

    return register


@_fake("quantize_rows")
def _quantize_rows_fake(x: Tensor, symmetric: bool) -> Quantized:
    M, K = x.shape
    return (
        x.new_empty((M, K), dtype=torch.int8),
        x.new_empty(M, dtype=torch.float32),
        x.new_empty(M, dtype=torch.int32),
    )


@_fake("layer_norm_quantize")
def _layer_norm_quantize_fake(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, symmetric: bool
) -> Quantized:
    return _quantize_rows_fake(x, symmetric)


@_fake("gated_quantize")
def _gated_quantize_fake(
    x: Tensor, activation: str, gamma: object = None, beta: object = None, eps: float = 0.0
) -> GatedRows:
    M, H = x.shape[0], x.shape[1] // 2
    x_q, x_scale, x_zero = _quantize_rows_fake(x.new_empty((M, H)), False)
    return x_q, x_scale, x_zero, torch.empty_like(x_q), torch.empty_like(x_scale)


@_fake("pack_weight")
def _pack_weight_fake(w_q: Tensor) -> tuple[Tensor, Tensor]:
    N, K = w_q.shape
    return w_q.new_empty(packed_shape(N, K, w_q.device)), w_q.new_empty(N, dtype=torch.int32)


@_fake("unpack_weight")
def _unpack_weight_fake(w: Tensor, N: int, K: int) -> Tensor:
    return w.new_empty((N, K))


@_fake("float_linear")
def _float_linear_fake(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


@_fake("int8_linear")
def _int8_linear_fake(
    x_q: Tensor, x_scale: Tensor, x_zero: Tensor | None, linear: PackedLinear, *,
    out_dtype: torch.dtype = torch.float32, **others: object,
) -> Tensor:  # fmt: skip
    return x_q.new_empty((x_q.shape[0], linear.N), dtype=out_dtype)


@_fake("int8_attention")
@_fake("float_attention")
def _attention_fake(
    qkv: Tensor, num_heads: int, causal: bool = False, rope: object = None, key_mask: object = None
) -> Tensor:
    B, L, D3 = qkv.shape
    return qkv.new_empty((B, L, D3 // 3))


@_fake("int8_block")
def _int8_block_fake(x: Tensor, block: BlockOperands, first_only: bool = False) -> Tensor:
    B, L, D = x.shape
    return x.new_empty((B, 1 if first_only else L, D))


@_fake("exit_probe")
def _exit_probe_fake(z: Tensor, head: ProbeHead) -> Probe:
    B, E = z.shape[0], head.classes.shape[1]
    confidence, margin, variance, score = (z.new_empty(B, dtype=torch.float32) for _ in range(4))
    embedding = z.new_empty((B, E), dtype=torch.float32)
    return embedding, z.new_empty(B, dtype=torch.int64), confidence, margin, variance, score


# FLOPs, two for each multiply-add as torch counts them. A formula is given shapes for tensors.


def _flops(name: str) -> Callable[[F], F]:
    def register(formula: F) -> F:
        register_flop_formula(getattr(torch.ops.lraee, name))(from_schema(name, formula))
        return formula

    return register


@_flops("int8_linear")
def _int8_linear_flops(
    x_q: torch.Size, x_scale: object, x_zero: object, linear: PackedLinear, **options: object
) -> int:
    M, K = x_q
    return 2 * M * int(linear.w_scale[0]) * K


@_flops("float_linear")
def _float_linear_flops(x: torch.Size, w: torch.Size, *rest: object, **options: object) -> int:
    M, K = x
    return 2 * M * int(w[0]) * K


@_flops("int8_attention")
@_flops("float_attention")
def _attention_flops(qkv: torch.Size, *rest: object, **options: object) -> int:
    B, L, D3 = qkv
    return 4 * B * L * L * (D3 // 3)


@_flops("int8_block")
def _int8_block_flops(
    x: torch.Size, block: BlockOperands, first_only: bool = False, **options: object
) -> int:
    B, L, D = x
    N, queries = int(block.c_fc.w_scale[0]), 1 if first_only else L
    mlp = 2 * D * N
    return 2 * B * (L * 3 * D * D + queries * (D * D + mlp)) + 4 * B * queries * L * D


@_flops("exit_probe")
def _exit_probe_flops(z: torch.Size, head: ProbeHead, **options: object) -> int:
    B, P, H = z[0], int(head.norm.gamma[0]), int(head.first.w_scale[0])
    K, E = head.classes  # a shape
    layers = P * H + (0 if head.second is None else H * E)
    return int(2 * B * (layers + K * E))
