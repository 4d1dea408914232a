"""transformers' vision layers as specs, in the layouts of its versions 4 and 5.

Layers are read by the names of what they hold, not by their class: some thirty classes have a dozen
names. A part that is named nowhere here is refused by its name.
"""

import inspect
from typing import Any, cast

from torch import nn

from lraee.layers.spec import ACTIVATIONS, Attention, BlockSpec, Call, Linear, Mlp, Rope, Rows
from lraee.ops.registry import PANEL_N
from lraee.towers.block_reader import BlockReader
from lraee.towers.families import UnsupportedBlockError

_CONTAINERS = (
    "self_attn", "attention", "attention.attention", "attention.output",
    "mlp", "ffn", "intermediate", "output", "layer_scale1", "layer_scale2",
)  # fmt: skip
_NORMS = (
    ("layer_norm1", "layer_norm2"), ("layernorm_before", "layernorm_after"),
    ("norm1", "norm2"), ("rms_norm1", "rms_norm2"),
)  # fmt: skip
_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_OUT = ("out_proj", "o_proj", "projection", "output.dense")
_MLPS = (
    ("mlp.fc1", "mlp.fc2"), ("intermediate.dense", "output.dense"),
    ("mlp.up_proj", "mlp.down_proj"), ("ffn.up_proj", "ffn.down_proj"),
    ("mlp.weights_in", "mlp.weights_out"),
)  # fmt: skip
_ACTIVATIONS = (
    "mlp.activation_fn", "mlp.activation", "mlp.act_fn", "ffn.act_fn",
    "intermediate.intermediate_act_fn",
)  # fmt: skip
_NAMES = {
    "GELUActivation": "gelu",
    "QuickGELUActivation": "quick_gelu", "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh",
    "SiLU": "silu", "SiLUActivation": "silu",
}  # fmt: skip
_IGNORED = frozenset({"output_hidden_states", "return_dict", "use_cache"})
"""Options of a model that its version 5 hands on to every layer."""


def read_block(block: nn.Module) -> BlockSpec:
    """The spec of a float vision layer.

    Raises: UnsupportedBlockError, what of it has no int8 kernel.
    """
    reader = BlockReader(block, _CONTAINERS)
    attention = _attention(reader)
    mlp = _mlp(reader)
    norm_1, norm_2 = _first(reader, _NORMS, "norms")
    spec = BlockSpec(
        attention=attention,
        mlp=mlp,
        norm_1=reader.norm(norm_1),
        norm_2=reader.norm(norm_2),
        scale_1=reader.tensor("layer_scale1.lambda1"),
        scale_2=reader.tensor("layer_scale2.lambda1"),
        call=_call(block),
    )
    reader.require_all_named()
    return spec


def _first(
    reader: BlockReader, candidates: tuple[tuple[str, ...], ...], what: str
) -> tuple[str, ...]:
    """The names that the layer has."""
    for names in candidates:
        if all(reader.has(name) for name in names):
            return names
    known = ", ".join(names[0] for names in candidates)
    raise UnsupportedBlockError(f"lacks {what} of a name that INT8 knows ({known})")


def _call(block: nn.Module) -> Call:
    """How the encoder calls the layer. In version 4 those that may return weights are tuples."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    return Call(
        names,
        mask="attention_mask",
        rope="position_embeddings" if "position_embeddings" in names else None,
        ignored=_IGNORED,
        outputs=1 if "output_attentions" in names else None,
    )


def _attention(reader: BlockReader) -> Attention:
    path = "self_attn" if reader.has("self_attn") else "attention"
    inner = f"{path}.attention" if reader.has(f"{path}.attention") else path
    if not reader.has(path):
        raise UnsupportedBlockError("lacks self_attn or attention, without which INT8 cannot read")
    attn = cast(Any, reader.modules[inner])
    H = getattr(attn, "num_heads", None) or getattr(attn, "num_attention_heads", None)
    if not isinstance(H, int):
        raise UnsupportedBlockError(f"has {path} without num_heads or num_attention_heads")
    in_proj = Linear(f"{path}.in_proj", "in_proj", _qkv(reader, inner))
    (out,) = _first(reader, tuple((f"{path}.{name}",) for name in _OUT), "a linear after attention")
    is_rotated = "position_embeddings" in inspect.signature(type(attn).forward).parameters
    return Attention(
        path=path,
        num_heads=H,
        head_dim=in_proj.shape(reader.block)[0] // (3 * H),
        in_proj=in_proj,
        out_proj=reader.linear(out, "out_proj"),
        call=Call(
            ("hidden_states", "attention_mask" if inner == path else "head_mask"),
            mask="attention_mask",
            rope="position_embeddings" if is_rotated else None,
            ignored=_IGNORED,
            outputs=2 if inner == path else None,
        ),
        rope=Rope(1 + int(attn.config.num_register_tokens)) if is_rotated else None,
    )


def _qkv(reader: BlockReader, path: str) -> tuple[Rows, ...]:
    """Queries, keys and values: one linear or three."""
    if reader.has(f"{path}.qkv"):
        return (reader.rows(f"{path}.qkv"),)
    names = tuple(tuple(f"{path}.{name}" for name in names) for names in _QKV)
    return tuple(reader.rows(name) for name in _first(reader, names, "queries, keys and values"))


def _mlp(reader: BlockReader) -> Mlp:
    fc1, fc2 = _first(reader, _MLPS, "linears of an MLP")
    gate = f"{fc1.rpartition('.')[0]}.gate_proj"
    is_packed = fc1.endswith("weights_in")
    is_gated = is_packed or reader.has(gate)
    activation = "silu" if is_packed else _activation(reader, is_gated)
    first = reader.linear(fc1, "c_fc")
    if is_packed and first.shape(reader.block)[0] % (2 * PANEL_N):
        raise UnsupportedBlockError(
            f"has a gated {fc1} of {first.shape(reader.block)[0]} rows, and INT8 cuts it at"
            f" multiples of {PANEL_N}"
        )
    return Mlp(
        first,
        reader.linear(fc2, "c_proj"),
        activation,
        is_gated,
        gate=reader.linear(gate, "c_fc") if is_gated and not is_packed else None,
    )


def _activation(reader: BlockReader, is_gated: bool) -> str:
    path = next((path for path in _ACTIVATIONS if path in reader.modules), None)
    module = None if path is None else reader.modules[path]
    reader.named_modules |= {name for name in reader.modules if path and name.startswith(path)}
    activation = activation_of(module)
    if activation is None or activation not in (*ACTIVATIONS, *(("silu",) if is_gated else ())):
        raise UnsupportedBlockError(
            f"has {type(module).__name__} as {path or 'activation'}, for which INT8 has no kernel"
        )
    return activation


def activation_of(module: nn.Module | None) -> str | None:
    """The operators' name of what an activation module computes, "silu", or None."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _NAMES.get(type(module).__name__)
