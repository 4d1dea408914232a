"""The VisionTransformer of the openai/CLIP package: how it is found, read and run.

Its parts have the names that open_clip took over; blocks are a Sequential on tokens [L, B, D]. The
package is never imported here: a tower is known by its parts.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.modules import library_class
from lraee.towers import open_clip
from lraee.towers.families import Family, UnsupportedBlockError
from lraee.towers.runner import RowwiseTower
from lraee.towers.spec import BlockSpec, Call, PatchEmbedding, Pooling, Projection, TowerSpec

_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "ln_post", "proj")


def is_tower(module: nn.Module) -> bool:
    """Whether this is the package's VisionTransformer, or built like it."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    return isinstance(blocks, nn.Sequential) and all(hasattr(module, part) for part in _PARTS)


def read_block(block: nn.Module) -> BlockSpec:
    """The spec of a float ResidualAttentionBlock.

    Raises: UnsupportedBlockError, what of it has no int8 kernel.
    """
    if getattr(block, "attn_mask", None) is not None:
        raise UnsupportedBlockError("has an attn_mask, for which INT8 has no kernel")
    spec = open_clip.read_block(block)
    return replace(spec, call=Call(("x",), is_sequence_first=spec.call.is_sequence_first))


def read_tower(tower: nn.Module) -> TowerSpec:
    """The spec of a VisionTransformer, float or accelerated."""
    held = cast(Any, tower)
    tokens, width = held.positional_embedding.shape
    patch = cast(tuple[int, int], tuple(held.conv1.kernel_size))
    macs = (tokens - 1) * width * held.conv1.in_channels * math.prod(patch)
    side = int(held.input_resolution)
    projection = None
    if held.proj is not None:
        projection = Projection("proj", True, (held.proj.shape[1], held.proj.shape[0]))
    return TowerSpec(
        family=FAMILY.name,
        float_class=library_class(tower),
        blocks=open_clip.BLOCKS,
        patch_embedding=PatchEmbedding("conv1", patch, macs),
        pooling=Pooling("class"),
        projection=projection,
        image_size=(side, side),
        tokens=tokens,
        width=width,
        prefix_tokens=1,
        final_norm="ln_post",
        embedding_size=width if projection is None else projection.shape[0],
    )


def embed(tower: nn.Module, x: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
    held = cast(Any, tower)
    z = held.conv1(x).flatten(2).transpose(1, 2)
    first = held.class_embedding.to(z.dtype).expand(len(z), 1, -1)
    return cast(
        Tensor, held.ln_pre(torch.cat([first, z], 1) + held.positional_embedding.to(z.dtype))
    )


class OpenAiTower(RowwiseTower):
    """Runs an accelerated VisionTransformer."""

    ln_post: nn.Module
    transformer: nn.Module

    def _runs_blocks(self, z: Tensor, rope: Any = None) -> Tensor:
        return cast(Tensor, self.transformer(z.transpose(0, 1).contiguous())).transpose(0, 1)

    def _finish(self, z: Tensor) -> Tensor:
        return self._project(self.ln_post(z[:, 0]))


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [B, E] of images [B, 3, H, W], by a model's visual or a bare tower."""
    return cast(Tensor, getattr(model, "visual", model)(images))


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit embeddings [n, E] of token ids."""
    return F.normalize(cast(Any, model).encode_text(tokens), dim=-1)


FAMILY = Family(
    name="openai/CLIP VisionTransformer",
    paths=("visual",),
    is_tower=is_tower,
    read_tower=read_tower,
    read_block=read_block,
    embed=embed,
    adapter=OpenAiTower,
    encode_image=encode_image,
    encode_text=encode_text,
)
