"""The kernels that are compared, as rows of data: a new variant is a row more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.kernels.float_attention import float_attention
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows
from lraee.ops import error_bounds as bounds
from lraee.ops import reference

Bound = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Attention:
    """One kernel of attention: qkv [B, L, 3 H d] and H -> [B, L, H d].

    Args:
      name: in results.
      run: the kernel.
      definition: in plain torch, and bound: how far from it the kernel may be.
    """

    name: str
    run: Callable[[Tensor, int], Tensor]
    definition: Callable[[Tensor, int], Tensor]
    bound: Bound


def _sdpa(qkv: Tensor, num_heads: int) -> Tensor:
    B, L, D3 = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D3 // 3)


ATTENTION = (
    Attention("float", float_attention, reference.float_attention, bounds.of_float_attention),
    Attention("int8", int8_attention, reference.int8_attention, bounds.of_attention),
)
RIVAL = "torch SDPA"


def rival(qkv: Tensor, num_heads: int) -> Tensor:
    """What torch would run."""
    return _sdpa(qkv, num_heads)


@dataclass(frozen=True)
class Rows:
    """One row-wise kernel: x [M, K] -> quantized rows, bit-equal with its definition."""

    name: str
    run: Callable[[Tensor], Any]
    definition: Callable[[Tensor], Any]


def _norm(x: Tensor) -> Any:
    return layer_norm_quantize(x, *_vectors(x), 1e-5, False)


def _norm_definition(x: Tensor) -> Any:
    return reference.layer_norm_quantize(x, *_vectors(x), 1e-5, False)


def _vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta."""
    gamma = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
    return gamma, gamma - 1


ROWS = (
    Rows(
        "quantize", lambda x: quantize_rows(x, False), lambda x: reference.quantize_rows(x, False)
    ),
    Rows("norm", _norm, _norm_definition),
)


def rival_norm(x: Tensor) -> Tensor:
    """torch's norm, which leaves the rows in float."""
    gamma, beta = _vectors(x)
    return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype))
