"""Rules that the arguments of operators must keep: one line names argument, rule and value."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lraee.kernels.operands import Norm, PackedLinear
from lraee.ops.reference import MAX_K
from lraee.ops.registry import packed_shape

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], types: Sequence[torch.dtype]
) -> None:
    """Raises unless tensor has this shape and one of these types."""
    if tensor.dtype not in types:
        wanted = " or ".join(str(t).removeprefix("torch.") for t in types)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def require_vectors(op: str, size: int, device: torch.device, **vectors: Tensor | None) -> None:
    """Raises unless each given tensor is float32 [size] on the device."""
    for name, vector in vectors.items():
        if vector is not None:
            require(op, name, vector, [size], [torch.float32])
            require_device(op, name, vector, device)


def require_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises unless the tensor is on the device."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the input, got {tensor.device}")


def require_float_rows(op: str, name: str, x: Tensor, dims: int) -> None:
    """Raises unless x is a floating-point tensor with this many dimensions."""
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {list(x.shape)}")
    require(op, name, x, x.shape, FLOAT_TYPES)


def require_weight(op: str, name: str, w: Tensor, N: int, K: int, device: torch.device) -> None:
    """Raises unless w is int8 in the layout of the device for the logical shape [N, K]."""
    require_device(op, name, w, device)
    if w.dtype is not torch.int8:
        raise TypeError(f"{op}: {name} must be int8, got {w.dtype}")
    wanted = packed_shape(N, K, device)
    if list(w.shape) != wanted or not w.is_contiguous():
        raise ValueError(
            f"{op}: {name} must have the {device.type} layout {wanted} of [N, K] = [{N}, {K}],"
            f" got {list(w.shape)}; pack it on this device with lraee.ops.pack_weight"
        )


def require_k(op: str, K: int) -> None:
    """Raises where int32 sums over K would not be exact."""
    if K > MAX_K:
        raise ValueError(f"{op}: K must be at most {MAX_K} (exact int32 sums), got {K}")


def require_linear(
    op: str, name: str, linear: PackedLinear, N: int, K: int, device: torch.device
) -> None:
    """Raises unless the operands of a linear are those of [N, K] on the device."""
    of = f"{name}." if name else ""
    w, w_scale, w_sum, bias, layer_scale = linear
    vectors = {"w_scale": w_scale, "bias": bias, "layer_scale": layer_scale}
    require_vectors(op, N, device, **{f"{of}{key}": vector for key, vector in vectors.items()})
    require(op, f"{of}w_sum", w_sum, [N], [torch.int32])
    require_device(op, f"{of}w_sum", w_sum, device)
    require_weight(op, f"{of}w", w, N, K, device)


def require_activation(op: str, activation: str, activations: Any) -> None:
    """Raises unless the activation is one of a Literal."""
    if activation not in get_args(activations):
        names = ", ".join(get_args(activations))
        raise ValueError(f"{op}: activation must be one of {names}, got {activation!r}")


def outputs(linear: PackedLinear) -> int:
    """N, or -1, which no shape has, where w_scale is no vector."""
    return linear.w_scale.shape[0] if linear.w_scale.dim() == 1 else -1


def require_norm(op: str, name: str, norm: Norm, size: int, device: torch.device) -> None:
    """Raises unless gamma and beta of the norm are float32 [size]; beta may be None."""
    vectors = {f"{name}.gamma": norm.gamma, f"{name}.beta": norm.beta}
    require_vectors(op, size, device, **vectors)


def require_attention(
    op: str, x: Tensor, d: int, rope: Tensor | None, key_mask: Tensor | None
) -> None:
    """Raises unless rope and key_mask fit [B, L, …] with heads of d channels."""
    B, L = x.shape[:2]
    if rope is not None:
        R = rope.shape[1] if rope.dim() == 3 else -1
        require(op, "rope", rope, [2, R, d], [torch.float32])
        require_device(op, "rope", rope, x.device)
        if R > L or d % 2:
            raise ValueError(
                f"{op}: rope must rotate an even number of channels of at most L = {L} tokens,"
                f" got {list(rope.shape)}"
            )
    if key_mask is not None:
        require(op, "key_mask", key_mask, [B, L], [torch.bool])
        require_device(op, "key_mask", key_mask, x.device)
