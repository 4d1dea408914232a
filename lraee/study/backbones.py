"""The backbones of the study: float, int8 and paper, all through the same accelerated tower."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.scheme import Scheme
from lraee.model.accelerate import accelerate
from lraee.towers import open_clip as towers


@dataclass(frozen=True)
class Model:
    """The model under study.

    Args:
      title: of the model and its weights.
      clip: the float model, on the CPU.
      classes: unit text features float32 [K, E].
      class_names: K words.
      templates: prompts per class that `classes` are means of.
    """

    title: str
    clip: nn.Module
    classes: Tensor
    class_names: tuple[str, ...]
    templates: int

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine in the softmax."""
        return float(self.clip.get_parameter("logit_scale").detach().exp())

    @property
    def tower(self) -> nn.Module:
        """The float image tower."""
        return towers.find_tower(self.clip)

    @property
    def depth(self) -> int:
        """Blocks of the image tower."""
        return len(towers.blocks_of(self.tower))


def float_scheme(tower: nn.Module) -> Scheme:
    """Every linear and attention in float: the control runs the same code and quantizes nothing.

    Its embeddings are those of the float model but for the order of float32 sums.
    """
    names = [f"resblocks.{i}.{p}" for i in range(len(towers.blocks_of(tower))) for p in _PATHS]
    return Scheme(attention="float", keep_float=tuple(names))


_PATHS = tuple(towers.PATHS.values())


def backbone(clip: nn.Module, name: str) -> nn.Module:
    """The float CLIP model as the backbone "float", "int8" or "paper"."""
    scheme = float_scheme(towers.find_tower(clip)) if name == "float" else name
    return accelerate(clip, scheme=scheme)


@torch.inference_mode()
def projected(tower: nn.Module, class_token: Tensor) -> Tensor:
    """The tower's own ln_post and projection of class tokens after any block: [..., D] -> [..., E].

    Raises: NotImplementedError on a tower that does not embed an image by its class token.
    """
    pool_type = getattr(tower, "pool_type", None)
    if pool_type != "tok" or getattr(tower, "attn_pool", None) is not None:
        raise NotImplementedError(
            "report: the tower must embed an image by its class token (pool_type 'tok'), got"
            f" pool_type {pool_type!r}"
        )
    ln_post = cast(nn.LayerNorm, tower.ln_post)
    proj = cast(Tensor, tower.proj)
    x = class_token.to(proj.dtype)
    y = F.layer_norm(x, ln_post.normalized_shape, ln_post.weight, ln_post.bias, ln_post.eps)
    return (y @ proj).float()


def paper_candidates(depth: int) -> tuple[int, ...]:
    """Exits 8, 9, 10, 11 of 12 blocks, at the same shares of another depth."""
    scaled = {round(block * depth / 12) for block in (8, 9, 10, 11)}
    return tuple(sorted(block for block in scaled if 1 <= block < depth))
