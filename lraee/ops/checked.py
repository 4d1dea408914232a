"""The public operators `lraee.ops.*`: checks arguments once, then calls `torch.ops.lraee.*`.

Shapes, types and devices, with one line that names the argument, the rule and the value. A module
does not come this way: what it holds is checked where it is built (Int8Linear, Int8Block, Int8Head
and the readers of checkpoints), and its calls go through lraee.ops.backend. Implementations assert
what memory safety needs. PyTorch's dispatcher chooses among them (lraee.ops.registry).
"""

from typing import Literal

import torch
from torch import Tensor

from lraee.kernels.operands import BlockOperands, Norm, PackedLinear, ProbeHead, to_schema
from lraee.ops import rules
from lraee.ops.backend import operators
from lraee.ops.reference import GatedRows, Probe, Quantized

Activation = Literal["none", "gelu", "gelu_tanh", "quick_gelu"]


def quantize_rows(x: Tensor, *, symmetric: bool) -> Quantized:
    """x ~ (x_q - x_zero) * x_scale with one scale and zero point per row.

    Numbers, NaN and zero rows: see lraee.ops.reference.quantize_rows.

    Args:
      x: float32, bfloat16 or float16 [M, K], any strides.
      symmetric: x_zero = 0 and steps -127..127; otherwise the range is used in full.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    Raises: ValueError on shape, TypeError on dtype.
    """
    rules.require_float_rows("quantize_rows", "x", x, 2)
    return torch.ops.lraee.quantize_rows(x, symmetric)  # type: ignore[no-any-return]


def layer_norm_quantize(
    x: Tensor, gamma: Tensor, beta: Tensor | None, *, eps: float = 1e-5, symmetric: bool
) -> Quantized:
    """quantize_rows(LayerNorm(x) * gamma + beta) in one pass over x; RMSNorm where beta is None.

    Args:
      x: float32, bfloat16 or float16 [M, D], any strides.
      gamma: float32 [D].
      beta: float32 [D] or None.
      eps: added to the variance, or to the mean square.
      symmetric: as in quantize_rows.
    Returns: x_q int8 [M, D], x_scale float32 [M], x_zero int32 [M].
    Raises: ValueError on shape or device, TypeError on dtype.
    """
    op = "layer_norm_quantize"
    rules.require_float_rows(op, "x", x, 2)
    rules.require_vectors(op, x.shape[1], x.device, gamma=gamma, beta=beta)
    return torch.ops.lraee.layer_norm_quantize(x, gamma, beta, eps, symmetric)  # type: ignore[no-any-return]


def pack_weight(w_q: Tensor) -> tuple[Tensor, Tensor]:
    """The layout that int8_linear reads on the device of w_q, and w_sum[n] = sum_k w_q[n, k].

    Args:
      w_q: int8 [N, K], K <= 65_793.
    Returns: w int8 (on the CPU [ceil(N/16), ceil(K/4), 16, 4] zero padded, else [N, K]),
      w_sum int32 [N].
    Raises: ValueError on shape, TypeError on dtype.
    """
    if w_q.dim() != 2:
        raise ValueError(f"pack_weight: w_q must have shape [N, K], got {list(w_q.shape)}")
    rules.require("pack_weight", "w_q", w_q, w_q.shape, [torch.int8])
    rules.require_k("pack_weight", w_q.shape[1])
    return torch.ops.lraee.pack_weight(w_q)  # type: ignore[no-any-return]


def unpack_weight(w: Tensor, N: int, K: int) -> Tensor:
    """The inverse of pack_weight.

    Args:
      w: int8, from pack_weight on its device.
      N: outputs.
      K: inputs.
    Returns: int8 [N, K].
    Raises: ValueError on a layout that is not the device's own, TypeError on dtype.
    """
    rules.require_weight("unpack_weight", "w", w, N, K, w.device)
    return torch.ops.lraee.unpack_weight(w, N, K)  # type: ignore[no-any-return]


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    linear: PackedLinear,
    *,
    residual: Tensor | None = None,
    activation: Activation = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q: int8 [M, K], contiguous rows (any row stride).
      x_scale: float32 [M], real value of one step of x_q.
      x_zero: int32 [M], the integer that stands for 0; None means 0 in every row.
      linear: packed weight of logical shape [N, K] with its scales, sums, bias and layer_scale; see
        PackedLinear and pack_weight.
      residual: out_dtype [M, N] or None.
      activation: none, gelu (erf), gelu_tanh or quick_gelu.
      out_dtype: float32, bfloat16 or float16.
    Returns: out_dtype [M, N]. Row m depends on row m of the input alone.
    Raises: ValueError on shape, device, layout or activation, TypeError on dtype.
    Accumulates in int32, exact for K <= 65_793. Rounding: half to even.
    """
    op, device = "int8_linear", x_q.device
    if x_q.dim() != 2:
        raise ValueError(f"{op}: x_q must have shape [M, K], got {list(x_q.shape)}")
    M, K = x_q.shape
    rules.require(op, "x_q", x_q, [M, K], [torch.int8])
    if K > 1 and x_q.stride(1) != 1:
        raise ValueError(f"{op}: x_q must have contiguous rows, got strides {list(x_q.stride())}")
    rules.require_k(op, K)
    rules.require_vectors(op, M, device, x_scale=x_scale)
    if x_zero is not None:
        rules.require(op, "x_zero", x_zero, [M], [torch.int32])
        rules.require_device(op, "x_zero", x_zero, device)
    N = rules.outputs(linear)
    rules.require_linear(op, "", linear, N, K, device)
    if out_dtype not in rules.FLOAT_TYPES:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if residual is not None:
        rules.require(op, "residual", residual, [M, N], [out_dtype])
        rules.require_device(op, "residual", residual, device)
    rules.require_activation(op, activation, Activation)
    return _int8_linear(  # type: ignore[no-any-return]
        x_q, x_scale, x_zero, linear,
        residual=residual, activation=activation, out_dtype=out_dtype,
    )  # fmt: skip


def float_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w.T + bias with each output summed in one fixed order, so row by row the same bits.

    Args:
      x: float32 [M, K], any strides.
      w: float32 [N, K], any strides; no copy is made of one that lies as [K, N] in memory.
      bias: float32 [N] or None.
    Returns: float32 [M, N]. Row m depends on row m of the input alone.
    Raises: ValueError on shape or device, TypeError on dtype.
    Error: |y - exact| <= (K + 1) 2^-24 (|x| @ |w|^T + |bias|), to first order.
    """
    op = "float_linear"
    if x.dim() != 2 or w.dim() != 2:
        raise ValueError(
            f"{op}: x and w must have shapes [M, K] and [N, K],"
            f" got {list(x.shape)} and {list(w.shape)}"
        )
    N = w.shape[0]
    rules.require(op, "x", x, x.shape, [torch.float32])
    rules.require(op, "w", w, [N, x.shape[1]], [torch.float32])
    rules.require_device(op, "w", w, x.device)
    rules.require_vectors(op, N, x.device, bias=bias)
    return torch.ops.lraee.float_linear(x, w, bias)  # type: ignore[no-any-return]


GateActivation = Literal["none", "silu", "gelu", "gelu_tanh", "quick_gelu"]


def gated_quantize(
    x: Tensor, *, activation: GateActivation = "silu", norm: Norm | None = None
) -> GatedRows:
    """norm(act(x[:, :H]) * x[:, H:]) in two terms of int8: (x_q - x_zero) x_scale + r_q r_scale.

    A linear of it is int8_linear(r_q, r_scale, None, linear without bias, residual=residual), and
    with that as residual int8_linear(x_q, x_scale, x_zero, linear).

    Args:
      x: float32, bfloat16 or float16 [M, 2 H], any strides: gate, then up part.
      activation: of the gate.
      norm: of the product [H], or None.
    Returns: x_q int8 [M, H], x_scale float32 [M], x_zero int32 [M], r_q int8 [M, H], r_scale
      float32 [M]. Row m depends on row m of x alone.
    Raises: ValueError on shape, device or activation, TypeError on dtype.
    """
    op = "gated_quantize"
    rules.require_float_rows(op, "x", x, 2)
    if x.shape[1] % 2:
        raise ValueError(f"{op}: x must have shape [M, 2 H], got {list(x.shape)}")
    rules.require_activation(op, activation, GateActivation)
    if norm is None:
        return torch.ops.lraee.gated_quantize(x, activation)  # type: ignore[no-any-return]
    rules.require_norm(op, "norm", norm, x.shape[1] // 2, x.device)
    return torch.ops.lraee.gated_quantize(x, activation, *norm)  # type: ignore[no-any-return]


def int8_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8, one scale per token and head.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D], any strides; L >= 1.
      num_heads: H >= 1, a divisor of D.
      causal: token i sees tokens 0..i only.
      rope: float32 [2, R, d] or None: cos and sin that rotate the last R tokens of Q and K, half
        layout; the first L - R (class and register tokens) are left as they are. Weights for the
        interleaved layout are converted by `interleaved_to_half`.
      key_mask: bool [B, L] or None: True where a token is a key, False where it is padding.
    Returns: [B, L, D] in the type of qkv. Image b depends on image b alone. On the CPU the rows of
      valid tokens have the bits of a call without the masked ones, wherever these are; on CUDA
      where valid tokens come first.
    Raises: ValueError on shape or device, TypeError on dtype.
    """
    _require_attention("int8_attention", qkv, num_heads, rope, key_mask)
    return torch.ops.lraee.int8_attention(qkv, num_heads, causal, rope, key_mask)  # type: ignore[no-any-return]


def float_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    causal: bool = False,
    rope: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in the type of qkv, for GPUs: tensor cores, float32 sums.

    On the CPU the definition runs, in float64: slow, for comparison.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D], any strides; L >= 1.
      num_heads: H >= 1, a divisor of D.
      causal: token i sees tokens 0..i only.
      rope: as in int8_attention.
      key_mask: bool [B, L] or None: True where a token is a key, False where it is padding.
    Returns: [B, L, D] in the type of qkv. Image b depends on image b alone.
    Raises: ValueError on shape or device, TypeError on dtype.
    """
    _require_attention("float_attention", qkv, num_heads, rope, key_mask)
    return torch.ops.lraee.float_attention(qkv, num_heads, causal, rope, key_mask)  # type: ignore[no-any-return]


def _require_attention(
    op: str, qkv: Tensor, num_heads: int, rope: Tensor | None, key_mask: Tensor | None
) -> None:
    rules.require_float_rows(op, "qkv", qkv, 3)
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"{op}: qkv must have a last size of 3 * num_heads * d with num_heads = {num_heads},"
            f" got {qkv.shape[2]}"
        )
    if qkv.shape[1] < 1:
        raise ValueError(f"{op}: qkv must hold at least one token, got shape {list(qkv.shape)}")
    rules.require_attention(op, qkv, qkv.shape[2] // (3 * num_heads), rope, key_mask)


def int8_block(x: Tensor, block: BlockOperands, *, first_only: bool = False) -> Tensor:
    """A whole transformer block: x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))).

    Arguments, shapes and result: see lraee.ops.reference.int8_block; the bits are those of the
    seven operators that it stands for.

    Raises: ValueError on shape, device, layout or activation, TypeError on dtype.
    """
    op, num_heads = "int8_block", block.num_heads
    rules.require_float_rows(op, "x", x, 3)
    D, device = x.shape[2], x.device
    if num_heads < 1 or D == 0 or D % num_heads or x.shape[1] < 1:
        raise ValueError(
            f"{op}: x must have shape [B, L >= 1, num_heads * d] with num_heads = {num_heads},"
            f" got {list(x.shape)}"
        )
    N = rules.outputs(block.c_fc)
    for name, norm in ("norm_1", block.norm_1), ("norm_2", block.norm_2):
        rules.require_norm(op, name, norm, D, device)
    shapes = {"in_proj": (3 * D, D), "out_proj": (D, D), "c_fc": (N, D), "c_proj": (D, N)}
    for name, shape in shapes.items():
        rules.require_linear(op, name, getattr(block, name), *shape, device)
    if len(block.symmetric) != 4:
        raise ValueError(f"{op}: symmetric must have 4 values, got {len(block.symmetric)}")
    rules.require_activation(op, block.activation, Activation)
    if block.attention not in ("int8", "float"):
        raise ValueError(f"{op}: attention must be int8 or float, got {block.attention!r}")
    rules.require_attention(op, x, D // num_heads, None, block.key_mask)
    return operators("auto").int8_block(x, block, first_only)  # type: ignore[no-any-return]


def exit_probe(z: Tensor, head: ProbeHead) -> Probe:
    """Exit head and gate of one depth: embedding, its best class, and the score of leaving here.

    Formula: see lraee.ops.reference.exit_probe. z is read from memory once.

    Args:
      z: float32, bfloat16 or float16 [B, L, D], class token first, L >= 2.
      head: norm, one or two linears, classes, logit_scale and gate; see ProbeHead.
    Returns: embedding float32 [B, E], top1 int64 [B], then float32 [B]: confidence, margin,
      variance, score.
    Raises: ValueError on shape, device or layout, TypeError on dtype.
    """
    op, device = "exit_probe", z.device
    norm, first, second, classes, _, gate = head
    rules.require_float_rows(op, "z", z, 3)
    if z.shape[1] < 2:
        raise ValueError(f"{op}: z must hold a class token and a patch, got shape {list(z.shape)}")
    if classes.dim() != 2 or classes.shape[0] < 1:
        raise ValueError(f"{op}: classes must have shape [K >= 1, E], got {list(classes.shape)}")
    D, (K, E) = z.shape[2], classes.shape
    if list(norm.gamma.shape) not in ([D], [2 * D]):
        raise ValueError(
            f"{op}: gamma must have shape [D] or [2 D] = [{D}] or [{2 * D}],"
            f" got {list(norm.gamma.shape)}"
        )
    P = norm.gamma.shape[0]
    rules.require_vectors(op, P, device, gamma=norm.gamma, beta=norm.beta)
    rules.require(op, "classes", classes, [K, E], rules.FLOAT_TYPES)
    rules.require_device(op, "classes", classes, device)
    rules.require_vectors(op, 4, device, gate=gate)
    hidden = E if second is None else rules.outputs(first)
    rules.require_linear(op, "first", first, hidden, P, device)
    if second is not None:
        rules.require_linear(op, "second", second, E, hidden, device)
    return _exit_probe(z, head)  # type: ignore[no-any-return]


_int8_linear = to_schema("int8_linear", torch.ops.lraee.int8_linear)
_exit_probe = to_schema("exit_probe", torch.ops.lraee.exit_probe)
