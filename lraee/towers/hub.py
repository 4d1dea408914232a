"""Models by name through open_clip: architectures, pretrained tags, tokenizers, preprocessing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL.Image import Image
from torch import Tensor, nn

Preprocess = Callable[[Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]

LIBRARY = "open_clip"
WEIGHTS_NAME = "open_clip_model.safetensors"
"""File name of a model's weights in a folder, as open_clip has it."""

MEAN: tuple[float, ...] = tuple(open_clip.OPENAI_DATASET_MEAN)
STD: tuple[float, ...] = tuple(open_clip.OPENAI_DATASET_STD)
IMAGENET_CLASS_NAMES: tuple[str, ...] = tuple(open_clip.IMAGENET_CLASSNAMES)


@dataclass(frozen=True)
class Pretrained:
    """A model in eval mode with what feeds it."""

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Tokenizer


def model_names() -> list[str]:
    """Every architecture that is known, those of add_config among them."""
    return list(open_clip.list_models())


def tags(name: str) -> list[str]:
    """The pretrained weights of an architecture."""
    return list(open_clip.list_pretrained_tags_by_model(name))


def add_config(path: Path) -> None:
    """Makes the architecture in this JSON file known, by the file's name."""
    open_clip.add_model_config(path)


def config_image_size(name: str) -> int:
    """Side in pixels of the images that an architecture takes."""
    return int(open_clip.get_model_config(name)["vision_cfg"]["image_size"])


def create_model(name: str, pretrained: str | None = None) -> nn.Module:
    """The model in eval mode, float32 on the CPU.

    Args:
      name: of the architecture.
      pretrained: tag or weights file; None gives random weights.
    """
    model: nn.Module = open_clip.create_model(name, pretrained=pretrained)
    return model.eval()


def tokenizer(name: str) -> Tokenizer:
    """List of texts -> int64 [n, context]."""
    result: Tokenizer = open_clip.get_tokenizer(name)
    return result


def count_tokens(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Tokens of each text without the padding after it, int64 [n], of ids [n, L].

    Tokenizers of CLIP pad with 0. Those of transformers name their padding; where it is the end of
    a text as well, the first one counts.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    padding = getattr(inner, "pad_token_id", None) or 0
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    counts = places.mul(tokens != padding).amax(1)
    ends_in_padding = inner is not None and getattr(inner, "eos_token_id", None) == padding
    return (counts + ends_in_padding).clamp(max=tokens.shape[1])


def create(name: str, pretrained: str | None) -> Pretrained:
    """The model with its own preprocessing and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    return Pretrained(model.eval(), preprocess, tokenizer(name))
