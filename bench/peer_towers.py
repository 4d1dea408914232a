"""The towers that bench.peers measures, and the images that it shows them."""

from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

import lraee
from lraee import zoo
from lraee.towers.families import encode_image, find_tower, tower_spec

HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-base-patch32": ("CLIPVisionModelWithProjection", {}),
    "dinov2-base": ("Dinov2Model", {"image_size": 224, "patch_size": 14}),
    "siglip-base-patch16-224": ("SiglipVisionModel", {"image_size": 224, "patch_size": 16}),
}
"""Class of transformers and how its config differs from the class's own, by published name."""


class Embeddings(nn.Module):
    """A model of transformers whose call takes images and returns embeddings, as others' do."""

    def __init__(self, model: nn.Module) -> None:
        """Of a model, float or accelerated."""
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, E]."""
        return encode_image(self.model, x)


def load_tower(name: str) -> nn.Module:
    """The image tower of a zoo model, or one with random weights.

    Args:
      name: of a zoo model; of an architecture of open_clip; "timm:NAME" or "timm:NAME@SIZE" with
        images of so many pixels; "hf:NAME" of HUGGING_FACE.
    """
    if name in zoo.names():
        return zoo.load(name)[0].visual  # type: ignore[return-value]
    torch.manual_seed(0)
    library, _, rest = name.rpartition(":")
    if library == "hf":
        return Embeddings(_hugging_face(rest)).eval().requires_grad_(False)
    if library == "timm":
        model, _, size = rest.partition("@")
        options: Any = {"img_size": int(size)} if size else {}
        tower: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **options)
    else:
        # open_clip names the size of its SigLIP models where it is not 224
        config = rest.removesuffix("-224")
        tower = open_clip.create_model(config).visual
    return tower.eval().requires_grad_(False)


def _hugging_face(name: str) -> nn.Module:
    import transformers

    class_name, changes = HUGGING_FACE[name]
    kind = getattr(transformers, class_name)
    return kind(kind.config_class(**changes))  # type: ignore[no-any-return]


def accelerated(tower: nn.Module, scheme: str = "int8") -> nn.Module:
    """lraee.accelerate of a tower of load_tower."""
    if isinstance(tower, Embeddings):
        return Embeddings(lraee.accelerate(tower.model, scheme=scheme))
    return lraee.accelerate(tower, scheme=scheme)


def image_size(tower: nn.Module) -> int:
    """Pixels of a side of its images."""
    return tower_spec(find_tower(getattr(tower, "model", tower))).image_size[0]


def photo_like_images(count: int, image_px: int) -> Tensor:
    """Smooth random images: noise at several scales, so that neighbouring patches agree."""
    source = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, image_px, image_px)
    for cells in (2, 4, 8, 16, 32):
        noise = torch.randn(count, 3, cells, cells, generator=source)
        images += nn.functional.interpolate(noise, size=image_px, mode="bicubic") / cells**0.5
    return images
