"""Every model that bench.coverage builds: one function per library, random weights, few blocks.

`LIBRARIES` names them; a library is added by one more function that yields cases.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import open_clip
import timm
import torch
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from bench.coverage_hugging_face import models as hugging_face_models
from lraee.towers.families import blocks_of, find_tower

Build = Callable[[int | None], nn.Module]
"""How many blocks to keep, None for all -> the float model in eval mode."""


@dataclass(frozen=True)
class Case:
    """One model of a library.

    Args:
      library, family, name: for the table.
      build: makes the model.
      image_size: height and width of its images.
      tags: pretrained weights of it that the library lists.
      same_as: cases of one library with equal keys have the same tower and are run once.
    """

    library: str
    family: str
    name: str
    build: Build
    image_size: tuple[int, int]
    tags: tuple[str, ...] = ()
    same_as: str = ""


# open_clip

_OPEN_CLIP_FAMILIES = (
    (r"^MobileCLIP2?-S", "MobileCLIP-S (FastViT)"),
    (r"^MobileCLIP", "MobileCLIP-B, MobileCLIP2-L"),
    (r"^convnext", "ConvNeXt"), (r"^RN|swin|relpos|gap_256", "other"),
    (r"SigLIP2", "SigLIP2"), (r"SigLIP|nllb-clip-.*-siglip", "SigLIP"),
    (r"^EVA01", "EVA01"), (r"^EVA02", "EVA02"), (r"^PE-Core", "PE-Core"), (r"^ViTamin", "ViTamin"),
    (r"^coca", "CoCa"),
)  # fmt: skip


def open_clip_cases() -> Iterator[Case]:
    """Every config of open_clip; its image tower alone."""
    tags: dict[str, list[str]] = {}
    for name, tag in open_clip.list_pretrained():
        tags.setdefault(name, []).append(tag)
    for name in open_clip.list_models():
        config = copy.deepcopy(open_clip.get_model_config(name))
        vision, is_quick = config["vision_cfg"], bool(config.get("quick_gelu", False))
        size = vision.get("image_size", 224)
        key = json.dumps([vision, config["embed_dim"], is_quick], sort_keys=True)
        family = next((f for part, f in _OPEN_CLIP_FAMILIES if re.search(part, name)), "ViT")
        family = "ResNet" if isinstance(vision.get("layers"), list) else family

        def build(
            depth: int | None, vision: Any = vision, config: Any = config, is_quick: bool = is_quick
        ) -> nn.Module:
            vision = copy.deepcopy(vision) | {"timm_model_pretrained": False}
            if depth is not None and isinstance(vision.get("layers"), int):
                vision["layers"] = depth
            return _numbered(
                lambda: _build_vision_tower(config["embed_dim"], vision, is_quick), depth
            )

        sizes = (size, size) if isinstance(size, int) else (size[0], size[1])
        yield Case("open_clip", family, name, build, sizes, tuple(tags.get(name, ())), key)


# timm

_TIMM = {
    "CLIP": "vit_base_patch32_clip_224 vit_large_patch14_clip_224",
    "ViT": "vit_small_patch16_224 vit_base_patch16_224 vit_betwixt_patch16_reg4_gap_256",
    "DeiT III": "deit3_base_patch16_224",
    "SigLIP, SigLIP2": "vit_base_patch16_siglip_224 vit_so400m_patch14_siglip_224"
    " vit_so400m_patch14_siglip_gap_224 vit_giantopt_patch16_siglip_256",
    "DINOv2": "vit_base_patch14_dinov2 vit_base_patch14_reg4_dinov2 vit_giant_patch14_dinov2",
    "DINOv3": "vit_base_patch16_dinov3 vit_small_plus_patch16_dinov3",
    "EVA01": "eva_giant_patch14_clip_224",
    "EVA02": "eva02_base_patch16_clip_224 eva02_large_patch14_clip_224 eva02_base_patch14_224",
    "EVA02-E": "eva02_enormous_patch14_clip_224",
    "PE": "vit_pe_core_base_patch16_224 vit_pe_core_tiny_patch16_384"
    " vit_pe_spatial_base_patch16_512 vit_pe_lang_large_patch14_448",
    "AIMv2": "aimv2_large_patch14_224",
    "MobileCLIP-B": "vit_base_mci_224",
    "ViTamin": "vitamin_small_224",
    "ViT with RoPE": "vit_base_patch16_rope_224 vit_base_patch16_rope_mixed_224",
    "InternViT": "vit_intern300m_patch14_448",
    "other": "beit_base_patch16_224 vit_relpos_medium_patch16_cls_224 samvit_base_patch16"
    " naflexvit_base_patch16_siglip swin_base_patch4_window7_224 fastvit_mci0 convnext_base"
    " resnet50",
}
_SMALLER = {"dinov2": 224}
"""Images of a model whose own are large."""


def timm_cases() -> Iterator[Case]:
    """timm's transformers that people load, without a classifier, and some that are refused."""
    for family, names in _TIMM.items():
        for name in names.split():
            config = timm.get_pretrained_cfg(name)
            assert config is not None
            size = next((s for part, s in _SMALLER.items() if part in name), config.input_size[-1])
            options = {"img_size": size} if size != config.input_size[-1] else {}

            def build(depth: int | None, name: str = name, options: Any = options) -> nn.Module:
                def make() -> nn.Module:
                    return timm.create_model(name, pretrained=False, num_classes=0, **options)

                return _numbered(make, depth)

            yield Case("timm", family, name, build, (size, size))


def hugging_face_cases() -> Iterator[Case]:
    """transformers' vision models, at published sizes."""
    for model, make in hugging_face_models():

        def build(depth: int | None, make: Build = make) -> nn.Module:
            result = make(depth).requires_grad_(False)
            stir(find_tower(result))
            return result

        yield Case("transformers", model.family, model.title, build, model.image_size)


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "open_clip": open_clip_cases,
    "timm": timm_cases,
    "transformers": hugging_face_cases,
}


# Weights


def _numbered(make: Callable[[], nn.Module], depth: int | None) -> nn.Module:
    """The model of `make` with random weights, its blocks cut to `depth`; never held whole."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = make().eval().requires_grad_(False)
    cut(model, depth)
    model = model.to_empty(device="cpu")
    stir(model)
    return model


def cut(model: nn.Module, depth: int | None) -> None:
    """Keeps the first blocks of every list of blocks; models of unknown structure stay whole."""
    trunk = getattr(model, "trunk", model)
    blocks = getattr(trunk, "blocks", None)
    if depth is not None and isinstance(blocks, nn.Sequential | nn.ModuleList):
        trunk.blocks = blocks[:depth]


def stir(model: nn.Module, seed: int = 1) -> None:
    """Weights with gain 1, so that blocks change the stream as much as it holds, and four loud
    channels in each norm of a block.
    """
    source = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
        if hasattr(module, "init_non_persistent_buffers"):
            cast(Any, module).init_non_persistent_buffers()
        for p in module.parameters(recurse=False):
            p.data.normal_(generator=source)
            p.data.mul_(1 / math.sqrt(p[0].numel()) if p.dim() in (2, 4) else 0.1)
        if "norm" in type(module).__name__.lower() and module._parameters.get("weight") is not None:
            cast(Tensor, module.weight).data.fill_(1.0)
    try:
        blocks = blocks_of(model)
    except TypeError:
        return
    for name, p in blocks.named_parameters():
        leaf = name.lower()
        if p.dim() == 1 and re.search(r"(norm\w*|ln_\d|ln_\w+)\.weight$", leaf):
            p.data.uniform_(0.5, 1.5, generator=source)
            p.data[:4] *= 6
        elif "gamma" in leaf or "lambda" in leaf:
            p.data.uniform_(0.1, 1.0, generator=source)


def pictures(n: int, size: tuple[int, int]) -> Tensor:
    """Smooth random images [n, 3, height, width]."""
    source = torch.Generator().manual_seed(2)
    small = torch.randn(n, 3, 12, 12, generator=source)
    return nn.functional.interpolate(small, size=size, mode="bicubic") * 1.2
