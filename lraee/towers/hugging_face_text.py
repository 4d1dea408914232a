"""transformers' text models, in its versions 4 and 5: how they are found and read.

The library is never imported here (see hugging_face_layouts). A model runs its own class's forward
over int8 layers: its outputs hold every token, so nothing of them is cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lraee.layers.batch_invariant import Rowwise, RowwiseLinear
from lraee.layers.modules import library_class
from lraee.towers.hugging_face_checks import (
    forget_recorders,
    register_recorders,
    require_no_attentions,
)
from lraee.towers.hugging_face_layouts import class_names, vision_path
from lraee.towers.hugging_face_poolers import ClassTokenPooler
from lraee.towers.hugging_face_text_blocks import read_text_block
from lraee.towers.text import TextFamily, TextMask, TextPooling, TextSpec

NAME = "transformers text model"


@dataclass(frozen=True)
class TextLayout:
    """What a text model does with its tokens.

    Args:
      mask: see TextSpec.
      pooling: see TextSpec; "end" is "argmax" in configs whose end-of-text id is CLIP's old one.
      masks_padding: texts are padded with an id that is to be masked.
    """

    mask: TextMask
    pooling: TextPooling
    masks_padding: bool = False


_KINDS = ("TextModel", "TextTransformer")
_BERT = TextLayout("none", "first", masks_padding=True)
LAYOUTS: dict[str, TextLayout] = {
    **{
        name + kind: TextLayout("causal", "end")
        for name in ("CLIP", "MetaClip2", "CLIPSeg") for kind in _KINDS
    },
    **{
        f"{name}TextTransformer": TextLayout("causal", "argmax")
        for name in ("OwlViT", "Owlv2")
    },
    **{
        name + kind: TextLayout("none", "last")
        for name in ("Siglip", "Siglip2") for kind in _KINDS
    },
    "ChineseCLIPTextModel": _BERT,
    "AltRobertaModel": _BERT,
}  # fmt: skip
"""Classes that hold embeddings, layers and what follows them, in version 4 or 5."""

_OLD_END = 2
"""The end-of-text id of configs that are older than the library's pooling by id."""

_PATHS = ("", "model", "auto_model", "0.model", "0.auto_model", "clip", "owlvit", "owlv2")
"""Where models of transformers and of its users hold an owner; sentence-transformers has `0`."""

_KNOWN = "CLIP, MetaClip2, CLIPSeg, OwlViT, Owlv2, Siglip, Siglip2, ChineseCLIP and AltCLIP"

_INNER = ("text_model", "roberta")
_BLOCKS = ("layers", "layer")
_AFTER = ("text_projection", "head", "transformation")


def _layout_of(module: nn.Module) -> TextLayout | None:
    if not isinstance(getattr(module, "embeddings", None), nn.Module):
        return None  # in version 4 some of these classes hold the one that is meant
    return next((LAYOUTS[name] for name in class_names(module) if name in LAYOUTS), None)


def _core_path(owner: nn.Module) -> str | None:
    """Where a model of transformers holds its embeddings and layers."""
    module = owner
    words: list[str] = []
    while any(True for _ in class_names(module)):
        if _layout_of(module) is not None:
            return ".".join(words)
        name = next((n for n in _INNER if isinstance(getattr(module, n, None), nn.Module)), None)
        if name is None:
            return None
        module, words = module.get_submodule(name), [*words, name]
    return None


def find(model: nn.Module) -> str | None:
    """Where the model is whose call gives text embeddings."""
    for path in _PATHS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if _core_path(module) is not None:
            return path
    return None


class TextModel(Rowwise):
    """Runs an accelerated text model."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the library's.

        Raises: NotImplementedError where attention weights are wanted.
        """
        require_no_attentions(self, named)
        register_recorders(self)
        return library_class(self).forward(self, *args, **named)


def read(owner: nn.Module, path: str) -> TextSpec:
    """The spec of a text model, alone or in one of images and texts."""
    core = cast(str, _core_path(owner))
    module = owner.get_submodule(core)
    layout = cast(TextLayout, _layout_of(module))
    config, encoder = cast(Any, module).config, module.get_submodule("encoder")
    blocks = next(name for name in _BLOCKS if name in encoder._modules)
    pooling, end_id = layout.pooling, None
    if pooling == "end":
        end_id = cast(int, module.eos_token_id)
        is_old = end_id == _OLD_END and "MetaClip2" not in type(config).__name__
        pooling = "argmax" if is_old else "end"
    return TextSpec(
        family=NAME,
        path=path,
        method="none",
        blocks=".".join(filter(None, (core, "encoder", blocks))),
        parts=(core.partition(".")[0], *_AFTER) if core else tuple(owner._modules),
        tokens=int(config.max_position_embeddings),
        mask=layout.mask,
        pooling=pooling,
        end_id=end_id,
        padding_id=config.pad_token_id if layout.masks_padding else None,
        is_alone=not path and vision_path(owner) is None,
        adapters=tuple(_adapters(owner, core)),
    )


def _adapters(owner: nn.Module, core: str) -> Iterator[tuple[str, type[Rowwise]]]:
    """The core, its pooler, and linears after the layers in the modules from the owner to it."""
    yield core, TextModel
    words = core.split(".") if core else []
    for depth in range(len(words) + 1):
        module = owner.get_submodule(".".join(words[:depth]))
        for name in _AFTER:
            if isinstance(module._modules.get(name), nn.Linear):
                yield ".".join((*words[:depth], name)), RowwiseLinear
    if isinstance(owner.get_submodule(core)._modules.get("pooler"), nn.Module):
        yield ".".join((*words, "pooler")), ClassTokenPooler


def encode(owner: nn.Module, text: Tensor) -> Tensor:
    """Ids [B, L] -> embeddings [B, E]: projected, or pooled where the model has no projection."""
    given = {"input_ids": text}
    padding_id = read(owner, "").padding_id
    if padding_id is not None:
        given["attention_mask"] = (text != padding_id).long()
    call = getattr(owner, "get_text_features", owner)
    output = call(**given)
    if isinstance(output, Tensor):
        return output
    result = getattr(output, "text_embeds", None)
    return cast(Tensor, output.pooler_output if result is None else result)


def refusal(model: nn.Module) -> str | None:
    """Why the text model of a model of transformers has no int8 form."""
    for path in _PATHS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        names = set(class_names(module))
        text = names and getattr(module, "text_model", None)
        if text:
            kind = library_class(text).__name__
            return f"its text model is a {kind}, and INT8 knows those of {_KNOWN}"
    return None


FAMILY = TextFamily(
    name=NAME,
    find=find,
    read=read,
    read_block=read_text_block,
    encode=encode,
    refusal=refusal,
    settle=forget_recorders,
    models=(f"{_KNOWN} of transformers, whole or text models alone",),
)
