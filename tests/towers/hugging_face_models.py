"""Tiny models of every class of transformers that is known, with weights that blocks feel."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers.families import find_tower
from lraee.towers.hugging_face_running import patches_of, vision_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
IS_5 = int(transformers.__version__.split(".")[0]) >= 5

VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
}  # fmt: skip


def _dual(name: str, **vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        kind = getattr(transformers, f"{name}Model")
        config = kind.config_class(
            vision_config={**VISION, **vision}, text_config=TEXT, projection_dim=48
        )
        return kind(config)

    return build


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**{**VISION, **options}))

    return build


def _llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=100,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}Model": _dual(name)
        for name in (
            "CLIP", "AltCLIP", "ChineseCLIP", "MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Blip",
            "Aimv2", "Siglip",
        )
    },
    "Siglip2Model": _dual("Siglip2", num_patches=16),
    "CLIPVisionModel": _vision("CLIPVisionModel"),
    "CLIPVisionModelWithProjection": _vision("CLIPVisionModelWithProjection", projection_dim=48),
    "MetaClip2VisionModelWithProjection": _vision(
        "MetaClip2VisionModelWithProjection", projection_dim=48
    ),
    "SiglipVisionModel": _vision("SiglipVisionModel"),
    "Siglip2VisionModel": _vision("Siglip2VisionModel", num_patches=16),
    "BlipVisionModel": _vision("BlipVisionModel"),
    "Blip2VisionModel": _vision("Blip2VisionModel", hidden_size=176),
    "ViTModel": _vision("ViTModel"),
    "DeiTModel": _vision("DeiTModel"),
    "Dinov2Model": _vision("Dinov2Model", mlp_ratio=2),
    "Dinov2 giant": _vision("Dinov2Model", use_swiglu_ffn=True),
    "Dinov2WithRegistersModel": _vision(
        "Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=4
    ),
    "DINOv3ViTModel": _vision("DINOv3ViTModel", num_register_tokens=4),
    "DINOv3 gated": _vision(
        "DINOv3ViTModel", num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
    ),
    "Aimv2VisionModel": _vision("Aimv2VisionModel"),
    "LLaVA": _llava,
}  # fmt: skip

PREFIX = {
    "DeiTModel": 2, "Dinov2WithRegistersModel": 5, "DINOv3ViTModel": 5, "DINOv3 gated": 5,
    **dict.fromkeys([name for name in MODELS if name.startswith(("Siglip", "Aimv2"))], 0),
}  # fmt: skip
"""Prefix tokens of the models; 1 of those that are not listed."""


def make(name: str) -> nn.Module:
    """The model in eval mode; every product has gain 1, so that blocks change what they read."""
    return copy.deepcopy(_made(name))


@cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for path, p in model.named_parameters():
        if p.dim() == 2:
            p.data = torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1])
        elif "norm" in path and path.endswith("weight"):
            p.data = torch.rand(p.shape, generator=generator) + 0.5
        elif "lambda" in path:
            p.data = torch.rand(p.shape, generator=generator) * 0.9 + 0.1
        elif p.dim() == 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.requires_grad_(False)


@cache
def accelerated(name: str) -> nn.Module:
    """Of `make(name)`; for tests that change nothing of it."""
    return lraee.accelerate(_made(name))


def pictures(n: int = 5, seed: int = 2) -> Tensor:
    """Images [n, 3, 32, 32]."""
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def given(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Images as the model's vision model takes them."""
    vision = vision_of(find_tower(model))[1]
    return patches_of(x, vision.patch_size) if vision.is_naflex else {"pixel_values": x}
