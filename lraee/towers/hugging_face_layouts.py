"""Which of transformers' vision classes are known, and where their parts lie.

A class is known by its name and by a module of transformers, so nothing here imports the library:
a process that holds such a model has imported it. A user's subclass is what its base is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """What follows the last layer of a vision model, and what precedes its patches.

    Args:
      pooling: "class": the norm of the class token; "twice": that, normed again; "pooler": a linear
        and an activation of it; "head": attention of a learned query to all tokens.
      norm: name of the norm after the last layer.
      prefix: class and distillation tokens; registers are counted by the config.
      takes_any_size: positions are made for the size of the images.
    """

    pooling: Literal["class", "twice", "pooler", "head"]
    norm: str
    prefix: int
    takes_any_size: bool = False


_CLIP_LIKE = ("CLIP", "AltCLIP", "ChineseCLIP", "MetaClip2", "CLIPSeg", "OwlViT", "Owlv2")
_KINDS = ("VisionModel", "VisionTransformer")
_CLIP, _SIGLIP = Layout("class", "post_layernorm", 1), Layout("head", "post_layernorm", 0)
_BLIP = Layout("twice", "post_layernorm", 1)

LAYOUTS: dict[str, Layout] = {
    **{name + kind: _CLIP for name in _CLIP_LIKE for kind in _KINDS},
    **{name + kind: _SIGLIP for name in ("Siglip", "Siglip2") for kind in _KINDS},
    **{name + "VisionModel": _BLIP for name in ("Blip", "Blip2", "InstructBlip")},
    "ViTModel": Layout("pooler", "layernorm", 1),
    "DeiTModel": Layout("pooler", "layernorm", 2),
    "Dinov2Model": Layout("class", "layernorm", 1, takes_any_size=True),
    "Dinov2WithRegistersModel": Layout("class", "layernorm", 1, takes_any_size=True),
    "DINOv3ViTModel": Layout("class", "norm", 1, takes_any_size=True),
    "Aimv2VisionModel": Layout("head", "rms_norm", 0),
}
"""Classes that hold embeddings, layers and what follows them, in version 4 or 5."""

DUAL = (
    "CLIPModel", "AltCLIPModel", "ChineseCLIPModel", "MetaClip2Model", "CLIPSegModel",
    "OwlViTModel", "Owlv2Model", "BlipModel", "Aimv2Model",
)  # fmt: skip
"""Classes that hold a vision model, its projection, and a text model."""

PROJECTED = ("CLIPVisionModelWithProjection", "MetaClip2VisionModelWithProjection")
"""Classes that hold a vision model and its projection."""

PATHS = (
    "vision_model", "vision_tower", "model.vision_tower", "model.vision_model",
    "vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "owlvit", "owlv2", "clip",
    "model", "auto_model", "0.model", "0.auto_model",
)  # fmt: skip
"""Where models of transformers and of its users hold one; sentence-transformers has `0`."""

_BLOCKS = ("encoder.layers", "encoder.layer", "layers", "model.layer", "layer")
_PATCHES = ("patch_embeddings.projection", "patch_embedding", "patch_embeddings", "patch_embed")
_PRE_NORMS = ("pre_layrnorm", "pre_layernorm")


def class_names(module: nn.Module) -> Iterator[str]:
    """Names of the module's class and its bases, as far as transformers defines them."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformers."):
            yield kind.__name__


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a vision model, or None."""
    if not isinstance(getattr(module, "embeddings", None), nn.Module):
        return None  # in version 4 some of these classes hold the one that is meant
    return next((LAYOUTS[name] for name in class_names(module) if name in LAYOUTS), None)


def is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the module is of one of these classes of transformers, and holds a vision model."""
    return any(name in names for name in class_names(module)) and vision_path(module) is not None


def vision_path(owner: nn.Module) -> str | None:
    """Where a model with a projection holds its vision model."""
    module, path = owner, ""
    for _ in range(2):
        inner = getattr(module, "vision_model", None)
        if not isinstance(inner, nn.Module):
            return None
        module, path = inner, f"{path}.vision_model".lstrip(".")
        if layout_of(module) is not None:
            return path
    return None


def _first(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    for path in paths:
        part: Any = module
        for name in path.split("."):
            part = getattr(part, name, None)
        if isinstance(part, nn.Module):
            return path
    return None


@dataclass(frozen=True)
class Vision:
    """A vision model, float or accelerated, by its parts.

    Args:
      module: of a class in LAYOUTS.
    """

    module: nn.Module

    @property
    def layout(self) -> Layout:
        """Of its class."""
        return cast(Layout, layout_of(self.module))

    @property
    def config(self) -> Any:
        """The library's config."""
        return self.module.config

    @property
    def blocks(self) -> str:
        """Path of the layers."""
        return cast(str, _first(self.module, _BLOCKS))

    @property
    def embeddings(self) -> Any:
        """The module of pixels to tokens."""
        return self.module.embeddings

    @property
    def patch_embedding(self) -> str:
        """Path of the convolution or linear of a patch."""
        return f"embeddings.{_first(self.embeddings, _PATCHES)}"

    @property
    def head(self) -> str | None:
        """Path of what pools, or None where a token is all there is."""
        name = {"head": "head", "pooler": "pooler"}.get(self.layout.pooling)
        return None if name is None else _first(self.module, (name,))

    @property
    def is_naflex(self) -> bool:
        """Whether images come as patches with their shapes."""
        return any(name.startswith("Siglip2Vision") for name in class_names(self.module))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels; of NaFlex a square of all positions."""
        if self.is_naflex:
            side = math.isqrt(self.config.num_patches) * self.config.patch_size
            return side, side
        return _pair(self.config.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return _pair(self.config.patch_size)

    @property
    def prefix(self) -> int:
        """Class, distillation and register tokens."""
        return self.layout.prefix + int(getattr(self.config, "num_register_tokens", 0) or 0)

    def before_blocks(self, z: Tensor) -> Tensor:
        """What stands between embeddings and layers."""
        path = _first(self.module, _PRE_NORMS)
        return z if path is None else cast(Tensor, self.module.get_submodule(path)(z))

    def pool(self, z: Tensor) -> Tensor:
        """Tokens after the last layer [B, L, D] -> pooled [B, E]; all where nothing pools."""
        norm = self.module.get_submodule(self.layout.norm)
        if self.layout.pooling in ("class", "twice"):
            pooled = cast(Tensor, norm(z[:, 0]))
            return pooled if self.layout.pooling == "class" else cast(Tensor, norm(pooled))
        z = norm(z)
        return z if self.head is None else cast(Tensor, self.module.get_submodule(self.head)(z))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
