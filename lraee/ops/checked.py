"""The one door to the operators `torch.ops.lraee.*`.

Shapes, types and devices are checked here, once, with one line that names the argument, the rule
and the value. PyTorch's dispatcher then chooses the implementation (see lraee.registry); below the
door implementations assert only what memory safety needs.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lraee.ops.block import Parts
from lraee.ops.reference import MAX_K, Probe, Quantized
from lraee.ops.registry import packed_shape

Activation = Literal["none", "gelu", "gelu_tanh", "quick_gelu"]
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _require(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], types: Sequence[torch.dtype]
) -> None:
    """Raises unless tensor has this shape and one of these types."""
    if tensor.dtype not in types:
        wanted = " or ".join(str(t).removeprefix("torch.") for t in types)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _require_vectors(op: str, size: int, device: torch.device, **vectors: Tensor | None) -> None:
    """Raises unless each given tensor is float32 [size] on the device."""
    for name, vector in vectors.items():
        if vector is not None:
            _require(op, name, vector, [size], [torch.float32])
            _require_device(op, name, vector, device)


def _require_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the input, got {tensor.device}")


def _require_float_rows(op: str, name: str, x: Tensor, dims: int) -> None:
    """Raises unless x is a floating-point tensor with this many dimensions."""
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {list(x.shape)}")
    _require(op, name, x, x.shape, FLOAT_TYPES)


def _require_weight(op: str, name: str, w: Tensor, N: int, K: int, device: torch.device) -> None:
    """Raises unless w is int8 in the layout of the device for the logical shape [N, K]."""
    _require_device(op, name, w, device)
    if w.dtype is not torch.int8:
        raise TypeError(f"{op}: {name} must be int8, got {w.dtype}")
    wanted = packed_shape(N, K, device)
    if list(w.shape) != wanted or not w.is_contiguous():
        raise ValueError(
            f"{op}: {name} must have the {device.type} layout {wanted} of [N, K] = [{N}, {K}],"
            f" got {list(w.shape)}; pack it on this device with lraee.ops.pack_weight"
        )


def quantize_rows(x: Tensor, *, symmetric: bool) -> Quantized:
    """x ~ (x_q - x_zero) * x_scale with one step and zero point per row.

    Numbers, NaN and zero rows: see lraee.reference.quantize_rows.

    Args:
      x: float32, bfloat16 or float16 [M, K], any strides.
      symmetric: x_zero = 0 and steps -127..127; otherwise the range is used in full.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    Raises: ValueError on shape, TypeError on dtype.
    """
    _require_float_rows("quantize_rows", "x", x, 2)
    return torch.ops.lraee.quantize_rows(x, symmetric)  # type: ignore[no-any-return]


def layer_norm_quantize(
    x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float = 1e-5, symmetric: bool
) -> Quantized:
    """quantize_rows(LayerNorm(x) * gamma + beta) in one pass over x.

    Args:
      x: float32, bfloat16 or float16 [M, D], any strides.
      gamma: float32 [D].
      beta: float32 [D].
      eps: added to the variance.
      symmetric: as in quantize_rows.
    Returns: x_q int8 [M, D], x_scale float32 [M], x_zero int32 [M].
    Raises: ValueError on shape or device, TypeError on dtype.
    """
    op = "layer_norm_quantize"
    _require_float_rows(op, "x", x, 2)
    _require_vectors(op, x.shape[1], x.device, gamma=gamma, beta=beta)
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
    _require("pack_weight", "w_q", w_q, w_q.shape, [torch.int8])
    _require_k("pack_weight", w_q.shape[1])
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
    _require_weight("unpack_weight", "w", w, N, K, w.device)
    return torch.ops.lraee.unpack_weight(w, N, K)  # type: ignore[no-any-return]


def _require_k(op: str, K: int) -> None:
    if K > MAX_K:
        raise ValueError(f"{op}: K must be at most {MAX_K} (exact int32 sums), got {K}")


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    activation: Activation = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q: int8 [M, K], contiguous rows (any row stride).
      x_scale: float32 [M], real value of one step of x_q.
      x_zero: int32 [M], the step that stands for 0; None means 0 in every row.
      w: packed weight of logical shape [N, K]; see pack_weight.
      w_scale: float32 [N], real value of one step of w.
      w_sum: int32 [N], from pack_weight.
      bias: float32 [N] or None.
      residual: out_dtype [M, N] or None.
      layer_scale: float32 [N] or None.
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
    N = w_scale.shape[0] if w_scale.dim() == 1 else -1
    _require(op, "x_q", x_q, [M, K], [torch.int8])
    if K > 1 and x_q.stride(1) != 1:
        raise ValueError(f"{op}: x_q must have contiguous rows, got strides {list(x_q.stride())}")
    _require_k(op, K)
    _require_vectors(op, M, device, x_scale=x_scale)
    _require_vectors(op, N, device, w_scale=w_scale, bias=bias, layer_scale=layer_scale)
    for name, vector, size in (("x_zero", x_zero, M), ("w_sum", w_sum, N)):
        if vector is not None:
            _require(op, name, vector, [size], [torch.int32])
            _require_device(op, name, vector, device)
    _require_weight(op, "w", w, N, K, device)
    if out_dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if residual is not None:
        _require(op, "residual", residual, [M, N], [out_dtype])
        _require_device(op, "residual", residual, device)
    if activation not in get_args(Activation):
        names = ", ".join(get_args(Activation))
        raise ValueError(f"{op}: activation must be one of {names}, got {activation!r}")
    return torch.ops.lraee.int8_linear(  # type: ignore[no-any-return]
        x_q, x_scale, x_zero, w, w_scale, w_sum, bias,
        residual=residual, layer_scale=layer_scale, activation=activation, out_dtype=out_dtype,
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
    _require(op, "x", x, x.shape, [torch.float32])
    _require(op, "w", w, [N, x.shape[1]], [torch.float32])
    _require_device(op, "w", w, x.device)
    _require_vectors(op, N, x.device, bias=bias)
    return torch.ops.lraee.float_linear(x, w, bias)  # type: ignore[no-any-return]


def int8_attention(qkv: Tensor, *, num_heads: int, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8, one step per token and head.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D], any strides; L >= 1.
      num_heads: H >= 1, a divisor of D.
      causal: token i sees tokens 0..i only.
    Returns: [B, L, D] in the type of qkv. Image b depends on image b alone.
    Raises: ValueError on shape, TypeError on dtype.
    """
    op = "int8_attention"
    _require_float_rows(op, "qkv", qkv, 3)
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"{op}: qkv must have a last size of 3 * num_heads * d with num_heads = {num_heads},"
            f" got {qkv.shape[2]}"
        )
    if qkv.shape[1] < 1:
        raise ValueError(f"{op}: qkv must hold at least one token, got shape {list(qkv.shape)}")
    return torch.ops.lraee.int8_attention(qkv, num_heads, causal)  # type: ignore[no-any-return]


def int8_block(
    x: Tensor,
    norm_1: Sequence[Tensor],
    in_proj: Parts,
    out_proj: Parts,
    norm_2: Sequence[Tensor],
    c_fc: Parts,
    c_proj: Parts,
    *,
    eps: tuple[float, float] = (1e-5, 1e-5),
    symmetric: tuple[bool, bool, bool, bool] = (False,) * 4,
    num_heads: int,
    causal: bool = False,
    activation: Activation = "gelu",
    first_only: bool = False,
) -> Tensor:
    """A whole transformer block: x + ls_1(attention(ln_1(x))), then that + ls_2(mlp(ln_2(that))).

    Arguments, shapes and result: see lraee.block.int8_block; the bits are those of the seven
    operators that it stands for.

    Raises: ValueError on shape, device, layout or activation, TypeError on dtype.
    """
    op = "int8_block"
    _require_float_rows(op, "x", x, 3)
    D, device = x.shape[2], x.device
    if num_heads < 1 or D == 0 or D % num_heads or x.shape[1] < 1:
        raise ValueError(
            f"{op}: x must have shape [B, L >= 1, num_heads * d] with num_heads = {num_heads},"
            f" got {list(x.shape)}"
        )
    for name, norm in (("norm_1", norm_1), ("norm_2", norm_2)):
        gamma, beta = norm
        _require_vectors(op, D, device, **{f"{name} gamma": gamma, f"{name} beta": beta})
    hidden = 0 if c_fc[1] is None else len(c_fc[1])
    shapes = {"in_proj": (3 * D, D), "out_proj": (D, D), "c_fc": (hidden, D), "c_proj": (D, hidden)}
    for (name, (N, K)), parts in zip(
        shapes.items(), (in_proj, out_proj, c_fc, c_proj), strict=True
    ):
        _require_linear(op, name, parts, N, K, device)
    if activation not in get_args(Activation):
        names = ", ".join(get_args(Activation))
        raise ValueError(f"{op}: activation must be one of {names}, got {activation!r}")
    return torch.ops.lraee.int8_block(  # type: ignore[no-any-return]
        x, norm_1, in_proj, out_proj, norm_2, c_fc, c_proj, eps, symmetric, num_heads, causal,
        activation, first_only=first_only,
    )  # fmt: skip


def _require_linear(op: str, name: str, parts: Parts, N: int, K: int, device: torch.device) -> None:
    """Raises unless parts are w, w_scale, w_sum, bias and perhaps layer_scale of [N, K]."""
    w, w_scale, w_sum, *vectors = parts
    if w is None or w_scale is None or w_sum is None or len(vectors) not in (1, 2):
        raise ValueError(f"{op}: {name} must be w, w_scale, w_sum, bias or None, and a layer_scale")
    _require_weight(op, name, w, N, K, device)
    named = zip(("bias", "layer_scale"), vectors, strict=False)
    rest = {f"{name} {key}": vector for key, vector in named}
    _require_vectors(op, N, device, **{f"{name} w_scale": w_scale}, **rest)
    _require(op, f"{name} w_sum", w_sum, [N], [torch.int32])


def exit_probe(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w1_sum: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    w2_scale: Tensor | None,
    w2_sum: Tensor | None,
    b2: Tensor | None,
    classes: Tensor,
    gate: Tensor,
    *,
    logit_scale: float,
    eps: float = 1e-5,
) -> Probe:
    """Exit head and gate of one depth: embedding, its best class, and the score of leaving here.

    Formula: see lraee.reference.exit_probe. z is read from memory once.

    Args:
      z: float32, bfloat16 or float16 [B, L, D], class token first, L >= 2.
      gamma, beta: float32 [P], with eps the LayerNorm of the head. P = D: it sees the patch mean
        alone; P = 2 D: the class token beside it.
      w1, w1_scale, w1_sum: packed int8 weight [H, P] ([E, P] where w2 is None); b1 float32 or None.
      w2, w2_scale, w2_sum: packed int8 weight [E, H], or all None; b2 float32 [E] or None.
      classes: float32, bfloat16 or float16 [K, E], K >= 1: rows of length 1, or those less one
        vector common to all, which changes no output.
      gate: float32 [4].
      logit_scale: factor of the cosine, already exponentiated.
      eps: added to the variance of the LayerNorm.
    Returns: embedding float32 [B, E], top1 int64 [B], then float32 [B]: confidence, margin,
      variance, score.
    Raises: ValueError on shape, device or layout, TypeError on dtype.
    """
    op, device = "exit_probe", z.device
    _require_float_rows(op, "z", z, 3)
    if z.shape[1] < 2:
        raise ValueError(f"{op}: z must hold a class token and a patch, got shape {list(z.shape)}")
    if classes.dim() != 2 or classes.shape[0] < 1:
        raise ValueError(f"{op}: classes must have shape [K >= 1, E], got {list(classes.shape)}")
    D, (K, E) = z.shape[2], classes.shape
    H = w1_scale.shape[0] if w1_scale.dim() == 1 else -1
    if list(gamma.shape) not in ([D], [2 * D]):
        raise ValueError(
            f"{op}: gamma must have shape [D] or [2 D] = [{D}] or [{2 * D}],"
            f" got {list(gamma.shape)}"
        )
    P = gamma.shape[0]
    _require_vectors(op, P, device, gamma=gamma, beta=beta)
    _require(op, "classes", classes, [K, E], FLOAT_TYPES)
    _require_device(op, "classes", classes, device)
    _require_vectors(op, 4, device, gate=gate)
    hidden = E if w2 is None else H
    _require_vectors(op, hidden, device, w1_scale=w1_scale, b1=b1)
    _require(op, "w1_sum", w1_sum, [hidden], [torch.int32])
    _require_weight(op, "w1", w1, hidden, P, device)
    if w2 is not None:
        if w2_scale is None or w2_sum is None:
            raise ValueError(f"{op}: w2_scale and w2_sum must be given with w2, got None")
        _require_vectors(op, E, device, w2_scale=w2_scale, b2=b2)
        _require(op, "w2_sum", w2_sum, [E], [torch.int32])
        _require_weight(op, "w2", w2, E, H, device)
    return torch.ops.lraee.exit_probe(  # type: ignore[no-any-return]
        z, gamma, beta, eps, w1, w1_scale, w1_sum, b1, w2, w2_scale, w2_sum, b2,
        classes, logit_scale, gate,
    )  # fmt: skip
