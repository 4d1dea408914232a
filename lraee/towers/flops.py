"""FLOPs of an image tower, two for each multiply-add as torch's FlopCounterMode counts them.

Importing this file also teaches FlopCounterMode the two attention operators that torch runs on a
CPU and counts as 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lraee.exits.head import Int8Head
from lraee.exits.router import Router
from lraee.layers.int8_attention import Int8Attention
from lraee.layers.int8_linear import Int8Linear
from lraee.towers.families import blocks_of, device_of, tower_spec
from lraee.towers.runner import ends_with_class_token


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one image through the tower.

    Args:
      linear: in Int8Linear.
      attention: in the int8 attention operator: Q K^T in integers, P V in float, half each.
      total: of the whole tower, patch embedding and projection included.
    """

    linear: int
    attention: int
    total: int

    @property
    def share(self) -> float:
        """Share of the total that int8 operators run."""
        return (self.linear + self.attention) / self.total

    @property
    def integer_share(self) -> float:
        """Share of the total that is multiplied in integers: P V is not."""
        return (self.linear + self.attention / 2) / self.total


def count_macs(tower: nn.Module) -> Macs:
    """The multiply-adds of one image of the tower's own size, float tower or accelerated."""
    spec = tower_spec(tower)
    L, D = spec.tokens, spec.width
    total = spec.patch_embedding.macs
    is_int8_embedding = isinstance(tower.get_submodule(spec.patch_embedding.path), Int8Linear)
    linear = total if is_int8_embedding else 0
    attention, device = 0, device_of(tower)
    for block in blocks_of(tower):
        total += _block_macs(block, L, D)
        linear += L * _int8_weight_count(block)
        is_int8 = any(
            isinstance(m, Int8Attention) and m.kind_on(device) == "int8" for m in block.modules()
        )
        attention += 2 * L * L * D if is_int8 else 0
    return Macs(linear, attention, total + spec.macs_after_blocks)


def tower_flops(visual: nn.Module) -> int:
    """FLOPs of one image of the tower's own size, the same for the float tower and the int8 one.

    Counted are products of matrices and the patch embedding: QKV, Q K^T, P V, out, fc1, fc2, the
    projection, and attention pooling where there is one. Norms, activations and sums are not.

    Args:
      visual: the image tower, float or accelerated; on any device, meta included.
    """
    return 2 * count_macs(visual).total


def block_flops(visual: nn.Module) -> list[int]:
    """FLOPs of one image in each block, first block first.

    Args:
      visual: as in tower_flops.
    """
    spec = tower_spec(visual)
    return [2 * _block_macs(block, spec.tokens, spec.width) for block in blocks_of(visual)]


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one image in the parts that a tower with exits runs on different images.

    Args:
      embed: patch embedding.
      blocks: each block.
      finish: all that follows the last block.
    """

    embed: int
    blocks: tuple[int, ...]
    finish: int

    @classmethod
    def of(cls, visual: nn.Module) -> "PartFlops":
        """The parts of a tower, float or accelerated; their sum is tower_flops."""
        embed = 2 * tower_spec(visual).patch_embedding.macs
        blocks = tuple(block_flops(visual))
        return cls(embed, blocks, tower_flops(visual) - embed - sum(blocks))

    @classmethod
    def as_run(cls, visual: nn.Module) -> "PartFlops":
        """The same without what an accelerated tower leaves out.

        Where the class token alone is embedded, the other tokens of the last block are keys and
        values to it and no more.
        """
        parts = cls.of(visual)
        if not ends_with_class_token(visual):
            return parts
        spec = tower_spec(visual)
        L, D = spec.tokens, spec.width
        left_out = (L - 1) * (2 * L * D + _weight_count(blocks_of(visual)[-1]) - 3 * D * D)
        return replace(parts, blocks=(*parts.blocks[:-1], parts.blocks[-1] - 2 * left_out))

    @property
    def total(self) -> int:
        """The whole tower."""
        return self.embed + sum(self.blocks) + self.finish

    def when_leaving(self, exits: Sequence[int], probes: Sequence[int]) -> list[int]:
        """FLOPs of an image that leaves at each exit, and last of one that passes them all.

        Args:
          exits: after how many blocks each exit stands, ascending.
          probes: FLOPs of the probe of each exit.
        """
        costs = [
            self.embed + sum(self.blocks[:depth]) + sum(probes[: e + 1])
            for e, depth in enumerate(exits)
        ]
        return [*costs, self.total + sum(probes)]


def probe_flops(router: Router) -> list[int]:
    """FLOPs of one image in the probe of each exit: head and classes."""
    K, E = router.classes.shape
    return [2 * (cast(Int8Head, head).macs + K * E) for head in router.heads]


def _block_macs(block: nn.Module, L: int, D: int) -> int:
    """Q K^T, P V, and the matrices that each token is multiplied with."""
    return 2 * L * L * D + L * _weight_count(block)


def _weight_count(block: nn.Module) -> int:
    in_float = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    return _int8_weight_count(block) + in_float


def _int8_weight_count(block: nn.Module) -> int:
    """Second terms of weights are not counted, nor are those of inputs."""
    linears = (m for m in block.modules() if isinstance(m, Int8Linear))
    rests = {id(m.rest) for m in block.modules() if isinstance(m, Int8Linear)}
    return sum(m.in_features * m.out_features for m in linears if id(m) not in rests)


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
