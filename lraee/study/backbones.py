"""The backbones of the study: float, int8 and paper, all through the same accelerated tower."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lraee.layers.scheme import Scheme
from lraee.model.accelerate import accelerate
from lraee.towers.class_token import finish_class_token, require_class_token
from lraee.towers.families import blocks_of, find_tower, linear_shapes


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
        return find_tower(self.clip)

    @property
    def depth(self) -> int:
        """Blocks of the image tower."""
        return len(blocks_of(self.tower))


def float_scheme(tower: nn.Module) -> Scheme:
    """Every linear and attention in float: the control runs the same code and quantizes nothing.

    Its embeddings are those of the float model but for the order of float32 sums.
    """
    return Scheme(attention="float", keep_float=tuple(linear_shapes(tower)))


def backbone(clip: nn.Module, name: str) -> nn.Module:
    """The float CLIP model as the backbone "float", "int8" or "paper"."""
    scheme = float_scheme(find_tower(clip)) if name == "float" else name
    return accelerate(clip, scheme=scheme)


@torch.inference_mode()
def projected(tower: nn.Module, class_token: Tensor) -> Tensor:
    """The tower's own final norm and projection of class tokens after any block.

    Args:
      tower: a float tower that embeds an image by its class token.
      class_token: [..., D].
    Returns: float32 [..., E].
    Raises: NotImplementedError on a tower that does not embed an image by its class token.
    """
    spec = require_class_token(tower, "report")
    return finish_class_token(tower, spec, class_token)


def paper_candidates(depth: int) -> tuple[int, ...]:
    """Exits 8, 9, 10, 11 of 12 blocks, at the same shares of another depth."""
    scaled = {round(block * depth / 12) for block in (8, 9, 10, 11)}
    return tuple(sorted(block for block in scaled if 1 <= block < depth))
