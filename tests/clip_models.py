"""Small open_clip models with random weights, one for each option that a tower may have."""

from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from lraee.towers import families

IMAGE_SIZE, VOCABULARY, CONTEXT = 32, 64, 8

VISION: dict[str, Any] = {
    "image_size": IMAGE_SIZE, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "custom_text": {"custom_text": True},
    "quick_gelu": {"quick_gelu": True},
    "gelu_tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}},
    "raw_in_proj": {"vision": {"block_type": "custom"}},
    "layer_scale": {"vision": {"ls_init_value": 0.3}},
    "raw_layer_scale": {"vision": {"block_type": "custom", "ls_init_value": 0.3}},
    "pool_avg": {"vision": {"pool_type": "avg"}},
    "pool_none": {"vision": {"pool_type": "none"}},
    "final_ln_after_pool": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "attentional_pool": {"vision": {"attentional_pool": True, "attn_pooler_queries": 5}},
    # open_clip's two-pooler form runs only where both widths are one
    "parallel_pool": {
        "vision": {"attentional_pool": "parallel", "attn_pooler_queries": 5},
        "embed_dim": 64,
    },
    "no_ln_pre": {"vision": {"no_ln_pre": True}},
    "patch_dropout": {"vision": {"patch_dropout": 0.5}},
    "norm_eps": {"vision": {"norm_kwargs": {"eps": 1e-6}}},
    "mlp_ratio": {"vision": {"mlp_ratio": 2.5}},
    "sin_cos": {"vision": {"pos_embed_type": "sin_cos_2d"}},
    "logit_bias": {"init_logit_bias": -10.0},
}


def make_model(
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    custom_text: bool = False,
    embed_dim: int = 24,
    **options: Any,
) -> nn.Module:
    """A CLIP (or CustomTextCLIP) in eval mode; every bias, norm and LayerScale is random too."""
    build = CustomTextCLIP if custom_text else CLIP
    model = build(
        embed_dim=embed_dim,
        vision_cfg={**VISION, **(vision or {})},
        text_cfg={**TEXT, **(text or {})},
        **options,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "embedding" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_images(n: int = 6) -> Tensor:
    """Smooth random pictures [n, 3, 32, 32]: neighbouring pixels are alike, as in photos."""
    coarse = torch.randn(n, 3, 4, 4)
    return nn.functional.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic")


def make_texts(n: int = 3) -> Tensor:
    """Random token ids [n, 8]."""
    return torch.randint(1, VOCABULARY, (n, CONTEXT))


def make_lraee_tiny() -> nn.Module:
    """The small real CLIP that the package ships."""
    from lraee import zoo

    return zoo.load("lraee-tiny")[0]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of the image tower, float or accelerated."""
    return families.blocks_of(families.find_tower(model))
