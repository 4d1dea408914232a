"""Tiny models with text towers of transformers, of its own classes and inside open_clip."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers.text import TextTower, find_text
from tests.clip_models import make_model
from tests.support import generator
from tests.towers.hugging_face_models import IS_5, TEXT, VISION

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

L, PADDING, END = 14, 0, 99
LENGTHS = (5, 9, 14, 3, 9)

DUAL = (
    "CLIP", "MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Siglip", "Siglip2", "ChineseCLIP",
    "AltCLIP",
)  # fmt: skip
ALONE = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "MetaClip2TextModel", "SiglipTextModel",
    "Siglip2TextModel", "ChineseCLIPTextModel", "AltCLIPTextModel", "OwlViTTextModel",
)  # fmt: skip


def _dual(name: str) -> nn.Module:
    kind = getattr(transformers, f"{name}Model")
    vision = {
        **VISION,
        "num_hidden_layers": 1,
        **({"num_patches": 16} if name == "Siglip2" else {}),
    }
    config = kind.config_class(vision_config=vision, text_config=TEXT, projection_dim=48)
    return kind(config)


def _alone(name: str) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**TEXT, projection_dim=48))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"{name}Model": (lambda name=name: _dual(name)) for name in DUAL},
    **{name: (lambda name=name: _alone(name)) for name in ALONE},
}
BROKEN = () if IS_5 else ("ChineseCLIPModel",)
"""Models whose get_text_features fails in this version of the library, float or not."""

CAUSAL = tuple(n for n in MODELS if n.startswith(("CLIP", "MetaClip2", "OwlViT", "Owlv2")))

KINDS = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "xlm-roberta": transformers.XLMRobertaConfig,
}
_HF: dict[str, Any] = {**TEXT, "max_position_embeddings": 40, "pad_token_id": 1}


def with_gain(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights that its blocks feel."""
    for path, p in model.named_parameters():
        seeded = generator(sum(map(ord, path)))
        if p.dim() == 2:
            p.data = torch.randn(p.shape, generator=seeded) / math.sqrt(p.shape[1])
        elif "norm" in path.lower() and path.endswith("weight"):
            p.data = torch.rand(p.shape, generator=seeded) + 0.5
        elif p.dim() == 1:
            p.data = torch.randn(p.shape, generator=seeded) * 0.1
    return model.eval()


@cache
def _made(name: str) -> nn.Module:
    return with_gain(MODELS[name]())


def make(name: str) -> nn.Module:
    """The model in eval mode."""
    return copy.deepcopy(_made(name))


def hf_encoder(
    kind: str = "roberta", pooler: str = "mean_pooler", proj: str | None = "mlp", **options: Any
) -> nn.Module:
    """A CustomTextCLIP of open_clip whose text tower is an HFTextEncoder of this kind."""
    from open_clip.hf_model import HFTextEncoder

    E = 24 if proj else int(_HF["hidden_size"])
    model = make_model(custom_text=True, embed_dim=E)
    config = KINDS[kind](**{**_HF, **options.pop("config", {})})
    model.text = HFTextEncoder("", E, config=config, pooler_type=pooler, proj_type=proj, **options)
    with_gain(model.text)
    return model.eval()


def make_ids(
    lengths: Sequence[int] = LENGTHS, *, width: int = L, padding: int = PADDING, end: int = END
) -> Tensor:
    """Ids [n, width]: words, the end as the last of each length, then padding; a row's words are
    the same in any width.
    """
    ids = torch.full((len(lengths), width), padding)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(4, 90, (n,), generator=generator(100 * n + i))
        ids[i, n - 1] = end
    return ids


def mask_of(lengths: Sequence[int] = LENGTHS, width: int = L) -> Tensor:
    """Which of these tokens are no padding, int64 [n, width]."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def features(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Text embeddings [B, E], as a user of transformers takes them."""
    with torch.no_grad():
        output = getattr(model, "get_text_features", model)(input_ids=ids, **options)
    if isinstance(output, Tensor):
        return output
    embeds = getattr(output, "text_embeds", None)
    return output.pooler_output if embeds is None else embeds


def text_model(model: nn.Module) -> nn.Module:
    """What returns the tokens of the last layer."""
    return getattr(model, "text_model", model)


def tower_of(model: nn.Module) -> TextTower:
    """The text tower."""
    tower = find_text(model)
    assert tower is not None
    return tower


@cache
def accelerated(name: str) -> nn.Module:
    """Of `make(name)`, text in int8; for tests that change nothing of it."""
    return lraee.accelerate(_made(name), text="int8")
