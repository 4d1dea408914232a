"""What an image tower is made of, whichever library it comes from; blocks are in layers.spec."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lraee.layers.modules import Adapter
from lraee.layers.spec import (
    Attention,
    BlockSpec,
    Call,
    Linear,
    Mlp,
    Norm,
    Rope,
    Rows,
)

__all__ = [
    "Attention", "BlockSpec", "Call", "Linear", "Mlp", "Norm", "PatchEmbedding", "Pooling",
    "Projection", "Rope", "Rows", "TowerSpec",
]  # fmt: skip

PoolingKind = Literal["class", "mean", "map", "perceiver", "none"]


@dataclass(frozen=True)
class PatchEmbedding:
    """Pixels to tokens.

    Args:
      path: of its module in the tower; a checkpoint with an int8 one names it so.
      size: height and width of a patch in pixels.
      macs: multiply-adds of one image in it.
    """

    path: str
    size: tuple[int, int]
    macs: int


@dataclass(frozen=True)
class Pooling:
    """Tokens after the last block to what is projected.

    Args:
      kind: "class": the class token alone; "mean" of the patches; "map": one learned query;
        "perceiver": several; "none": every token.
      attention: paths of modules that are torch's nn.MultiheadAttention of learned queries, with
        tokens [B, L, D].
      vectors: of one image that come out.
      macs: multiply-adds of one image in it.
    """

    kind: PoolingKind
    attention: tuple[str, ...] = ()
    vectors: int = 1
    macs: int = 0


@dataclass(frozen=True)
class Projection:
    """The last product.

    Args:
      weight: name of its weight in the tower.
      is_transposed: the weight is [K, N], multiplied from the right; else a linear's [N, K].
      shape: N, K.
      bias: name of its bias, or None.
    """

    weight: str
    is_transposed: bool
    shape: tuple[int, int]
    bias: str | None = None


@dataclass(frozen=True)
class TowerSpec:
    """An image tower, float or accelerated, as its family's reader describes it.

    Args:
      family: name, for messages and doctor.
      float_class: the library's class, which an accelerated tower is a subclass of.
      blocks: path of the block list in the tower.
      patch_embedding, pooling, projection: see there; None where there is no projection.
      image_size: height and width in pixels that the tower takes.
      tokens: L of such an image, prefix tokens included.
      width: D.
      prefix_tokens: class and register tokens before the patches: 0, 1, 5.
      final_norm: path of the norm after the last block, or None.
      embedding_size: E where an image has one embedding, of a class that exits are known to fit;
        else None.
      extra_output: the option by which this tower returns more than embeddings, or None.
      adapters: path of a float module beside the blocks, and what its class is mixed with in an
        accelerated tower so that it has the same bits in any batch; inner modules first.
    """

    family: str
    float_class: type[nn.Module]
    blocks: str
    patch_embedding: PatchEmbedding
    pooling: Pooling
    projection: Projection | None
    image_size: tuple[int, int]
    tokens: int
    width: int
    prefix_tokens: int
    final_norm: str | None
    embedding_size: int | None
    extra_output: str | None = None
    adapters: tuple[tuple[str, type[Adapter]], ...] = ()

    @property
    def macs_after_blocks(self) -> int:
        """Multiply-adds of one image in pooling and projection."""
        N, K = (0, 0) if self.projection is None else self.projection.shape
        return self.pooling.macs + self.pooling.vectors * N * K

    @property
    def block_parents(self) -> tuple[str, ...]:
        """Paths of the modules between the tower and its blocks, the list itself last."""
        words = self.blocks.split(".")
        return tuple(".".join(words[: i + 1]) for i in range(len(words)))

    def block_name(self, i: int) -> str:
        """Of block i, in `keep_float` and checkpoints, such as "blocks.3"."""
        return f"{self.blocks.rpartition('.')[2]}.{i}"
