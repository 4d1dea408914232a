"""The text towers that bench.text runs, and how a user of their library calls them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn

from lraee.towers.prompts import TEMPLATES
from lraee.zoo.opening import open_model

Encode = Callable[[Tensor], Tensor]
"""Token ids [B, L] -> embeddings [B, E]."""

_CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_hidden_layers": 12, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
_SMALL_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """A float model, its prompts, and the call.

    Args:
      model: in eval mode; its image tower is not run.
      texts: token ids int64 [n, L].
      padding_id: where the library's tokenizer pads to the longest text of a batch: with what; else
        None, and texts have the whole context.
      encode: model, ids [B, L] -> embeddings [B, E].
    """

    model: nn.Module
    texts: Tensor
    padding_id: int | None
    encode: Callable[[nn.Module, Tensor], Tensor]

    def batch(self, size: int) -> Tensor:
        """The first texts, as the library's tokenizer pads them."""
        ids = self.texts[:size]
        return ids if self.padding_id is None else ids[:, : int(_lengths(ids).max())]


def prompts(count: int) -> list[str]:
    """So many prompts of CLIP's templates and class names, of their usual lengths."""
    names = open_clip.IMAGENET_CLASSNAMES
    step = len(names) // count
    return [TEMPLATES[i % len(TEMPLATES)](names[i * step]) for i in range(count)]


def _lengths(ids: Tensor) -> Tensor:
    """Tokens up to the end-of-text token, which has CLIP's highest id."""
    return ids.argmax(1) + 1


def open_tower(name: str, count: int) -> Tower:
    """A tower by name: "transformers-clip", "open_clip-bert", or one of open_clip or the zoo.

    The first two have random weights of gain 1: CLIP ViT-B/32's text model, and BERT-base with mean
    pooling in open_clip's HFTextEncoder. Their tokenizers are on the hub, so they are given the
    ids of CLIP's.
    """
    special = {"transformers-clip": _transformers_clip, "open_clip-bert": _open_clip_bert}
    if name in special:
        return special[name](count)
    opened = open_model(name, may_be_random=True)
    return Tower(opened.model, opened.tokenizer(prompts(count)), None, encode_open_clip)


def encode_open_clip(model: nn.Module, ids: Tensor) -> Tensor:
    """encode_text of open_clip."""
    return cast(Tensor, cast(Any, model).encode_text(ids))


def encode_transformers(model: nn.Module, ids: Tensor) -> Tensor:
    """get_text_features of transformers, masked as its tokenizers do, after the end of a text."""
    mask = (torch.arange(ids.shape[1]) < _lengths(ids)[:, None]).long()
    output = cast(Any, model).get_text_features(input_ids=ids, attention_mask=mask)
    return cast(Tensor, output if isinstance(output, Tensor) else output.pooler_output)


def _transformers_clip(count: int) -> Tower:
    import transformers

    config = transformers.CLIPConfig(
        text_config=_CLIP_TEXT, vision_config=_SMALL_VISION, projection_dim=512
    )
    model = with_gain(transformers.CLIPModel(config))
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts(count))
    return Tower(model, _padded(ids, 49407), 49407, encode_transformers)


def _open_clip_bert(count: int) -> Tower:
    import transformers
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import CustomTextCLIP

    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    model = CustomTextCLIP(512, vision, text)
    config = transformers.BertConfig(vocab_size=49408, pad_token_id=0)
    model.text = HFTextEncoder("", 512, config=config, pooler_type="mean_pooler", proj_type="mlp")
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts(count))
    return Tower(with_gain(model), _padded(ids, 0), None, encode_open_clip)


def _padded(ids: Tensor, padding_id: int) -> Tensor:
    """The ids with this one after the end of each text."""
    return torch.where(torch.arange(ids.shape[1]) < _lengths(ids)[:, None], ids, padding_id)


def with_gain(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights of gain 1, so that blocks change what they read."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 2:
            p.data = torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1])
    return model.eval().requires_grad_(False)
