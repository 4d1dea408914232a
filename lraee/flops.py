"""FLOPs of an image tower, two for each multiply-add as torch's FlopCounterMode counts them.

Importing this file also teaches FlopCounterMode the two attention operators that torch runs on a
CPU and counts as 0.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lraee import towers
from lraee.linear import Int8Linear


def tower_flops(visual: nn.Module) -> int:
    """FLOPs of one image of the tower's own size, the same for the float tower and the int8 one.

    Counted are products of matrices and the patch embedding: QKV, Q K^T, P V, out, fc1, fc2, the
    projection, and attentional pooling where there is one. Norms, activations and sums are not.

    Args:
      visual: open_clip's VisionTransformer, float or accelerated; on any device, meta included.
    """
    return 2 * towers.count_macs(visual).total


def block_flops(visual: nn.Module) -> list[int]:
    """FLOPs of one image in each block, first block first.

    Args:
      visual: as in tower_flops.
    """
    L, D = cast(Tensor, visual.positional_embedding).shape
    attention = 2 * L * L * D
    return [2 * (L * _weight_count(block) + attention) for block in towers.blocks_of(visual)]


def _weight_count(block: nn.Module) -> int:
    """Elements of the matrices that each token is multiplied with."""
    in_int8 = sum(
        module.in_features * module.out_features
        for module in block.modules()
        if isinstance(module, Int8Linear)
    )
    return in_int8 + sum(p.numel() for p in block.parameters() if p.dim() == 2)


# What FlopCounterMode does not know of


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **options: object
) -> int:
    """Q K^T and P V of [B, H, L, d] heads; a mask takes nothing off, as in torch's own formulas."""
    B, H, L, d = query
    return 2 * B * H * L * key[2] * (d + value[3])


def _multi_head_attention_flops(
    query: torch.Size, key: torch.Size, *rest: object, **options: object
) -> int:
    """The fast path of nn.MultiheadAttention: projections and self-attention of [B, L, D]."""
    B, L, D = query
    return 2 * B * (4 * L * D * D + 2 * L * key[1] * D)


def _teach(name: str, formula: Callable[..., int]) -> None:
    """Registers the formula unless this torch has one, or lacks the operator."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is not None and operator not in flop_registry:
        register_flop_formula(operator)(formula)


_teach("_scaled_dot_product_flash_attention_for_cpu", _attention_flops)
_teach("_native_multi_head_attention", _multi_head_attention_flops)
