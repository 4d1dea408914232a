"""Layers of transformers' text models as specs, in the layouts of its versions 4 and 5."""

import inspect
from dataclasses import replace
from typing import Any, cast

from torch import nn

from lraee.layers.spec import ACTIVATIONS, Attention, BlockSpec, Call, Linear, Mlp
from lraee.towers.block_reader import BlockReader
from lraee.towers.families import UnsupportedBlockError
from lraee.towers.hugging_face_blocks import activation_of, read_block
from lraee.towers.text import TextSpec

_IGNORED = frozenset({
    "output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position",
    "is_causal", "causal_attention_mask",
})  # fmt: skip
"""What layers are called with that says nothing new: positions are in the tokens, and a layer of a
causal tower knows that it is one."""

_CONTAINERS = ("attention", "attention.self", "attention.output", "intermediate", "output")
_QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))


def read_text_block(block: nn.Module, spec: TextSpec) -> BlockSpec:
    """The spec of a float text layer of transformers.

    Raises: UnsupportedBlockError, what of it has no int8 kernel.
    """
    is_bert = isinstance(getattr(getattr(block, "attention", None), "self", None), nn.Module)
    read = _read_bert(block) if is_bert else read_block(block)
    attention, call = read.attention, cast(Call, read.attention.call)
    return replace(
        read,
        attention=replace(
            attention,
            is_causal=spec.mask == "causal",
            masks_keys=True,
            call=replace(call, ignored=_IGNORED),
        ),
        call=replace(read.call, ignored=_IGNORED),
    )


def _read_bert(block: nn.Module) -> BlockSpec:
    """A layer that norms the sum after each branch: BERT, RoBERTa, XLM-RoBERTa."""
    reader = BlockReader(
        block, _CONTAINERS, {"attention.self.distance_embedding": " (relative positions)"}
    )
    attn = cast(Any, reader.modules["attention.self"])
    if getattr(attn, "is_decoder", False):
        raise UnsupportedBlockError("has attention of a decoder, for which INT8 has no kernel")
    in_proj = Linear("attention.self.in_proj", "in_proj", tuple(reader.rows(n) for n in _QKV))
    activation = activation_of(reader.modules.get("intermediate.intermediate_act_fn"))
    reader.named_modules.add("intermediate.intermediate_act_fn")
    if activation is None or activation not in ACTIVATIONS:
        kind = type(reader.modules.get("intermediate.intermediate_act_fn")).__name__
        raise UnsupportedBlockError(f"has {kind} as activation, for which INT8 has no kernel")
    H, parameters = int(attn.num_attention_heads), inspect.signature(type(block).forward).parameters
    names = tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    spec = BlockSpec(
        attention=Attention(
            path="attention.self",
            num_heads=H,
            head_dim=in_proj.shape(block)[0] // (3 * H),
            in_proj=in_proj,
            out_proj=reader.linear("attention.output.dense", "out_proj"),
            call=Call(("hidden_states", "attention_mask"), mask="attention_mask", outputs=2),
        ),
        mlp=Mlp(
            reader.linear("intermediate.dense", "c_fc"),
            reader.linear("output.dense", "c_proj"),
            activation,
        ),
        norm_1=reader.norm("attention.output.LayerNorm"),
        norm_2=reader.norm("output.LayerNorm"),
        call=Call(
            names,
            mask="attention_mask",
            outputs=1 if "output_attentions" in names else None,
        ),
        order="sum",
    )
    reader.require_all_named()
    return spec
