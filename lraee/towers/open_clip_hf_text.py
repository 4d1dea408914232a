"""open_clip's HFTextEncoder: BERT, RoBERTa and XLM-RoBERTa of transformers as a text tower."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from lraee.layers.batch_invariant import Rowwise, RowwiseLinear, is_fixed, rowwise_linear
from lraee.layers.modules import is_hooked, library_class
from lraee.layers.pooling import rowwise_activation, rowwise_mean
from lraee.towers.hugging_face_checks import forget_recorders
from lraee.towers.hugging_face_poolers import ClassTokenPooler
from lraee.towers.hugging_face_text import TextModel
from lraee.towers.hugging_face_text_blocks import read_text_block
from lraee.towers.text import TextFamily, TextSpec

NAME = "open_clip HFTextEncoder"
KINDS = ("bert", "roberta", "xlm-roberta")
"""Model types of transformers' configs whose layers are BERT's."""

_PARTS = ("transformer", "pooler", "proj")


def _tower(model: nn.Module) -> nn.Module | None:
    text = model._modules.get("text")
    is_known = text is not None and library_class(text).forward is HFTextEncoder.forward
    return text if is_known else None


def _kind(tower: nn.Module) -> str:
    return str(getattr(cast(Any, tower).config, "model_type", None))


def find(model: nn.Module) -> str | None:
    """The `text` of a CustomTextCLIP or CoCa, where its layers are BERT's."""
    text = _tower(model)
    return "text" if text is not None and _kind(text) in KINDS else None


def read(owner: nn.Module, path: str) -> TextSpec:
    """The spec of an HFTextEncoder."""
    config = cast(Any, owner).config
    return TextSpec(
        family=NAME,
        path=path,
        method="forward",
        blocks="transformer.encoder.layer",
        parts=_PARTS,
        tokens=int(config.max_position_embeddings),
        mask="none",
        pooling="none",
        padding_id=config.pad_token_id,
        adapters=tuple(_adapters(owner)),
    )


def _adapters(owner: nn.Module) -> Iterator[tuple[str, type[Rowwise]]]:
    transformer = owner.get_submodule("transformer")
    yield "transformer", TextModel
    if isinstance(transformer._modules.get("pooler"), nn.Module):
        yield "transformer.pooler", ClassTokenPooler
    if library_class(owner.get_submodule("pooler")).__name__ == "MeanPooler":
        yield "pooler", MeanPooler
    proj = owner._modules["proj"]
    if isinstance(proj, nn.Linear):
        yield "proj", RowwiseLinear
    elif isinstance(proj, nn.Sequential):
        yield "proj", MlpProjection


class MeanPooler(Rowwise):
    """MeanPooler, text by text: torch's sums have another order in another batch."""

    def forward(self, x: Any, attention_mask: Tensor) -> Tensor:
        """Tokens [B, L, D] and which of them are valid [B, L] -> [B, D]; NaN without any."""
        z = x.last_hidden_state
        valid = attention_mask.bool()
        if not is_fixed(z.device, self.rowwise_backend) or not bool(valid.any(1).all()):
            return cast(Tensor, super().forward(x, attention_mask))
        texts = zip(z.unbind(), valid.unbind(), strict=True)
        rows = [rowwise_mean(one[own][None], self.rowwise_backend) for one, own in texts]
        return torch.cat([z.new_empty(0, z.shape[2]), *rows])


class MlpProjection(Rowwise):
    """The projection of two linears and a GELU between them."""

    def forward(self, input: Tensor) -> Tensor:
        """Pooled [B, D] -> [B, E]."""
        parts, backend = list(self._modules.values()), self.rowwise_backend
        is_observed = any(part is not None and is_hooked(part) for part in parts)
        if is_observed or not is_fixed(input.device, backend):
            return cast(Tensor, super().forward(input))
        y = input
        for part in cast(list[nn.Module], parts):
            if isinstance(part, nn.Linear):
                y = rowwise_linear(y, part.weight, part.bias, backend)
            else:
                y = rowwise_activation(part, y)
        return y


def encode(owner: nn.Module, text: Tensor) -> Tensor:
    """Ids [B, L] -> embeddings [B, E], by the class's own forward."""
    return cast(Tensor, cast(Any, library_class(owner)).forward(owner, text))


def is_plain(owner: nn.Module) -> bool:
    """Whether a call returns embeddings alone."""
    return not getattr(owner, "output_tokens", False)


def refusal(model: nn.Module) -> str | None:
    """Why the text tower of a model of open_clip has no int8 form."""
    text = _tower(model)
    if text is None:
        return None
    kind = _kind(text)
    if kind in ("mt5", "t5"):
        return (
            f"it has a {kind} text tower, which adds a position bias to the scores of attention;"
            " INT8 has no kernel for that"
        )
    return f"it has a {kind} text tower, and INT8 knows {', '.join(KINDS)}"


FAMILY = TextFamily(
    name=NAME,
    find=find,
    read=read,
    read_block=read_text_block,
    encode=encode,
    is_plain=is_plain,
    takes_others=True,
    refusal=refusal,
    settle=forget_recorders,
    models=("BERT, RoBERTa and XLM-RoBERTa towers of open_clip",),
)
