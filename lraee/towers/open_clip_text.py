"""open_clip's text towers: TextTransformer, and the same parts held by a CLIP itself."""

from dataclasses import replace
from typing import Any, cast

from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from lraee.layers.batch_invariant import rowwise_linear
from lraee.layers.int8_attention import is_causal
from lraee.layers.modules import library_class
from lraee.layers.spec import BlockSpec
from lraee.ops.backend import Backend
from lraee.towers import open_clip
from lraee.towers.text import TextFamily, TextMask, TextPooling, TextSpec, TextSteps

NAME = "open_clip TextTransformer"
_PARTS = ("token_embedding", "transformer", "ln_final", "text_projection")
_POOLINGS: dict[str, TextPooling] = {
    "argmax": "argmax", "eos": "end", "first": "first", "last": "last", "none": "none",
}  # fmt: skip


def find(model: nn.Module) -> str | None:
    """Where the parts are: in the model itself, in its `text`, or nowhere.

    A class with an encode_text or forward of its own may compute anything, and is left alone.
    """
    if getattr(type(model), "encode_text", None) is CLIP.encode_text:
        return ""
    text = model._modules.get("text")
    is_known = text is not None and library_class(text).forward is TextTransformer.forward
    return "text" if is_known else None


def read(owner: nn.Module, path: str) -> TextSpec:
    """The spec of a CLIP's own text tower, or of a TextTransformer."""
    is_flat = not path
    pool_type = getattr(owner, "text_pool_type" if is_flat else "pool_type", "argmax")
    # an appended class token is pooled whatever pool_type says, and reads every token
    has_class_token = getattr(owner, "cls_emb", None) is not None
    tokens = owner.get_parameter("positional_embedding").shape[0]
    return TextSpec(
        family=NAME,
        path=path,
        method="encode_text" if is_flat else "forward",
        blocks=open_clip.BLOCKS,
        parts=_PARTS,
        tokens=tokens,
        mask=_mask(owner, tokens),
        pooling="last" if has_class_token else _POOLINGS.get(pool_type, "none"),
        end_id=getattr(owner, "text_eos_id" if is_flat else "eos_id", None),
    )


def _mask(owner: nn.Module, tokens: int) -> TextMask:
    try:
        is_so = is_causal(cast(Tensor | None, owner.attn_mask), tokens)
    except NotImplementedError:
        return "other"
    return "causal" if is_so else "none"


def read_block(block: nn.Module, spec: TextSpec) -> BlockSpec:
    """The spec of a float block, which knows its causal mask.

    Raises: UnsupportedBlockError.
    """
    read = open_clip.read_block(block)
    return replace(read, attention=replace(read.attention, is_causal=spec.mask == "causal"))


def embed(owner: nn.Module, text: Tensor) -> Tensor:
    """Ids [B, L] -> tokens [B, L, D], as both classes do it."""
    dtype = cast(Any, owner.get_submodule("transformer")).get_cast_dtype()
    x = owner.get_submodule("token_embedding")(text).to(dtype)
    return cast(Tensor, x + owner.get_parameter("positional_embedding")[: x.shape[1]].to(dtype))


def run_blocks(owner: nn.Module, z: Tensor, is_masked: bool) -> Tensor:
    """Tokens [B, L, D] through all blocks."""
    mask, L = cast(Tensor | None, owner.attn_mask), z.shape[1]
    own = mask[:L, :L] if is_masked and mask is not None else None
    return cast(Tensor, owner.get_submodule("transformer")(z, attn_mask=own))


def norm(owner: nn.Module, z: Tensor) -> Tensor:
    """The norm after the last block."""
    return cast(Tensor, owner.get_submodule("ln_final")(z))


def project(owner: nn.Module, pooled: Tensor, backend: Backend | None) -> Tensor:
    """[..., D] -> [..., E]: a matrix, a linear, or nothing."""
    last = cast(nn.Linear | Tensor | None, owner.text_projection)
    if last is None:
        return pooled
    if backend is None:
        return cast(Tensor, last(pooled) if isinstance(last, nn.Linear) else pooled @ last)
    w, bias = (last.weight, last.bias) if isinstance(last, nn.Linear) else (last.t(), None)
    return rowwise_linear(pooled, w, bias, backend)


def is_plain(owner: nn.Module) -> bool:
    """Whether a call returns embeddings alone, and masks nothing but later tokens."""
    options = ("output_tokens", "use_pad_mask")
    has_class_token = getattr(owner, "cls_emb", None) is not None
    return not has_class_token and not any(getattr(owner, name, False) for name in options)


def encode(owner: nn.Module, text: Tensor) -> Tensor:
    """Ids [B, L] -> embeddings [B, E], by the class's own method."""
    kind = cast(Any, library_class(owner))
    is_flat = getattr(kind, "encode_text", None) is CLIP.encode_text
    return cast(Tensor, (kind.encode_text if is_flat else kind.forward)(owner, text))


FAMILY = TextFamily(
    name=NAME,
    find=find,
    read=read,
    read_block=read_block,
    encode=encode,
    steps=TextSteps(embed, run_blocks, norm, project),
    is_plain=is_plain,
    models=("CLIP", "CustomTextCLIP", "SigLIP, PE, MobileCLIP, ViTamin of open_clip"),
)
