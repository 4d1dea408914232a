"""The models of transformers that bench.coverage builds: their published sizes, random weights.

Each is run as users run it: its vision model's embedding of images. The classes of text around it
get a text model of two small layers, which no check reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_B: dict[str, Any] = {
    "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip
_L: dict[str, Any] = {
    "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "image_size": 224,
    "patch_size": 14,
}  # fmt: skip
_GIANT: dict[str, Any] = {
    "hidden_size": 1536, "num_attention_heads": 24, "mlp_ratio": 4, "image_size": 224,
    "patch_size": 14, "use_swiglu_ffn": True,
}  # fmt: skip
_BLIP_2: dict[str, Any] = {
    "hidden_size": 1408, "num_attention_heads": 16, "intermediate_size": 6144, "image_size": 224,
    "patch_size": 14,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
}  # fmt: skip
_WHOLE_DEPTH = 12


@dataclass(frozen=True)
class Model:
    """One class of transformers at one size.

    Args:
      family: for the table.
      name: of the class.
      config: of its vision model, depth excluded.
      has_text: whether a text model belongs to it.
      label: what tells it from others of its class.
    """

    family: str
    name: str
    config: dict[str, Any]
    has_text: bool = False
    label: str = ""

    @property
    def title(self) -> str:
        """For the table."""
        return f"{self.name} {self.label}".strip()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        side = int(self.config["image_size"])
        return side, side

    def build(self, depth: int | None) -> nn.Module:
        """The float model with so many layers, or 12."""
        import transformers

        config = {**self.config, "num_hidden_layers": depth or _WHOLE_DEPTH}
        kind = getattr(transformers, self.name)
        if not self.has_text:
            return kind(kind.config_class(**config)).eval()  # type: ignore[no-any-return]
        whole = kind.config_class(vision_config=config, text_config=_TEXT, projection_dim=512)
        return kind(whole).eval()  # type: ignore[no-any-return]


_NAFLEX = {**_B, "num_patches": 196}
MODELS: tuple[Model, ...] = (
    *(
        Model(family, f"{name}Model", {**_B, "patch_size": 32}, has_text=True)
        for family, name in (
            ("CLIP", "CLIP"), ("CLIP", "AltCLIP"), ("CLIP", "ChineseCLIP"), ("CLIP", "MetaClip2"),
            ("CLIPSeg, OWL-ViT", "CLIPSeg"), ("CLIPSeg, OWL-ViT", "OwlViT"),
            ("CLIPSeg, OWL-ViT", "Owlv2"), ("BLIP", "Blip"),
        )
    ),
    Model("CLIP", "CLIPVisionModel", _L, label="L/14"),
    Model("CLIP", "CLIPVisionModelWithProjection", _L, label="L/14"),
    Model("CLIP", "MetaClip2VisionModelWithProjection", _L, label="L/14"),
    Model("SigLIP", "SiglipModel", _B, has_text=True, label="B/16"),
    Model("SigLIP", "SiglipVisionModel", {**_L, "hidden_size": 1152, "intermediate_size": 4304},
          label="SO400M/14"),
    Model("SigLIP 2 NaFlex", "Siglip2Model", _NAFLEX, has_text=True, label="B/16"),
    Model("SigLIP 2 NaFlex", "Siglip2VisionModel", _NAFLEX, label="B/16"),
    Model("BLIP", "BlipVisionModel", _B, label="B/16"),
    Model("BLIP", "Blip2VisionModel", _BLIP_2, label="g/14"),
    Model("ViT, DeiT", "ViTModel", _B, label="B/16"),
    Model("ViT, DeiT", "DeiTModel", _B, label="B/16"),
    Model("DINOv2", "Dinov2Model", {**_B, "patch_size": 14}, label="B/14"),
    Model("DINOv2", "Dinov2Model", _GIANT, label="giant"),
    Model("DINOv2", "Dinov2WithRegistersModel", {**_B, "patch_size": 14, "num_register_tokens": 4},
          label="B/14"),
    Model("DINOv3", "DINOv3ViTModel", {**_B, "num_register_tokens": 4}, label="B/16"),
    Model("DINOv3", "DINOv3ViTModel", {
        **_L, "patch_size": 16, "num_register_tokens": 4, "use_gated_mlp": True,
        "hidden_act": "silu",
    }, label="gated"),
    Model("AIMv2", "Aimv2VisionModel", {**_L, "intermediate_size": 2816, "num_attention_heads": 8},
          label="L/14"),
)  # fmt: skip


def models() -> Iterator[tuple[Model, Callable[[int | None], nn.Module]]]:
    """Each model, and what builds it."""
    for model in MODELS:
        yield model, model.build
