"""timm's towers of every structure that INT8 knows, small and with weights that move the tokens."""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import Tensor, nn

SIZE, PATCH, D, H, LAYERS = 32, 8, 64, 2, 4
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Swiglu = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)


def vit(**options: Any) -> VisionTransformer:
    small = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": D, "depth": LAYERS, "num_heads": H}
    return VisionTransformer(**{**small, "num_classes": 0, **options})


def eva(**options: Any) -> Eva:
    small = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": D, "depth": LAYERS, "num_heads": H}
    return Eva(**{**small, "num_classes": 0, "head_init_scale": 0.0, **options})


def _behind(backbone: nn.Module) -> Any:
    return partial(HybridEmbed, backbone=backbone, proj=False)


def vitamin() -> VisionTransformer:
    backbone = MbConvStages(VitCfg(embed_dim=(8, 16, D), depths=(1, 1, 1), stem_width=8))
    return vit(
        patch_size=1, embed_layer=_behind(backbone), mlp_layer=GeGluMlp, mlp_ratio=2.0,
        class_token=False, global_pool="avg",
    )  # fmt: skip


def mobile_clip() -> VisionTransformer:
    stem = ConvStem(
        channels=(16, 16, D), stride=(2, 2, 2), kernel_size=(3, 3, 3), act_layer=nn.GELU
    )
    return vit(patch_size=1, embed_layer=_behind(stem), no_embed_class=True, num_classes=24)


_ROPE = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
_EVA02 = {"swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 4 * 2 / 3, "num_classes": 24, **_ROPE}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: vit(pre_norm=True, act_layer=QuickGELU),
    "siglip": lambda: vit(class_token=False, global_pool="map", act_layer=GELUTanh),
    "dinov2": lambda: vit(init_values=0.5, reg_tokens=4, no_embed_class=True),
    "dinov2 giant": lambda: vit(init_values=0.5, mlp_layer=Swiglu, mlp_ratio=2 * 2.0),
    "mean pool": lambda: vit(class_token=False, global_pool="avg", qk_norm=True, num_classes=10),
    "mobile_clip": mobile_clip,
    "vitamin": vitamin,
    "aimv2": lambda: vit(
        class_token=False, global_pool="avg", norm_layer=partial(RmsNorm, eps=1e-5),
        mlp_layer=SwiGLU, qkv_bias=False, proj_bias=False, fc_norm=False,
    ),
    "eva01": lambda: eva(global_pool="token", num_heads=1, num_classes=24),
    "eva02": lambda: eva(global_pool="token", qkv_fused=False, scale_attn_inner=True, **_EVA02),
    "eva02 post-norm": lambda: eva(
        global_pool="token", qkv_fused=True, use_post_norm=True, num_classes=24
    ),
    "pe_core": lambda: eva(
        global_pool="map", attn_type="rope", use_pre_transformer_norm=True, num_classes=24,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), rope_grid_indexing="xy", **_ROPE,
    ),
    "dinov3": lambda: eva(
        init_values=0.5, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4,
        use_rot_pos_emb=True, use_abs_pos_emb=False, qkv_bias=False, dynamic_img_size=True,
        use_fc_norm=False,
    ),
}  # fmt: skip


def make_trunk(family: str, seed: int = 0) -> nn.Module:
    """A float trunk with gain 1; the random generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = FAMILIES[family]().eval()
        with torch.no_grad():
            for name, p in trunk.named_parameters():
                _stir(name, p)
    return trunk.requires_grad_(False)


def _stir(name: str, p: Tensor) -> None:
    if p.dim() == 2 and name.endswith("weight"):
        p.copy_(torch.randn(p.shape) / math.sqrt(p.shape[1]))
    elif "norm" in name and name.endswith("weight") or "gamma" in name:
        p.copy_(torch.rand(p.shape) + 0.5)
    elif p.dim() < 4:
        p.copy_(torch.randn(p.shape) * 0.2)


def as_timm_model(trunk: nn.Module, E: int = 24, *, has_projection: bool = False) -> TimmModel:
    """open_clip's wrapper of this trunk."""
    model = TimmModel("test_vit", E, image_size=SIZE, proj="linear", pretrained=False)
    model.trunk = trunk
    layers = [("drop", nn.Dropout(0.0)), ("proj", nn.Linear(D, E, bias=False))]
    model.head = nn.Sequential(OrderedDict(layers if has_projection else []))
    return model.eval().requires_grad_(False)


def images(n: int = 5, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(n, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bicubic")
