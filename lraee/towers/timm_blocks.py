"""timm's transformer blocks: Block, ResPostBlock, EvaBlock and EvaBlockPostNorm, as specs.

Blocks are read by the names of what they hold. A part that no reader names is refused by its name.
"""

from typing import Any, Literal, cast

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn

from lraee.layers.spec import ACTIVATIONS, Attention, BlockSpec, Call, Linear, Mlp, Rope, Rows
from lraee.ops.registry import PANEL_N
from lraee.towers.block_reader import BlockReader
from lraee.towers.families import UnsupportedBlockError

BLOCKS: dict[type[nn.Module], Literal["pre", "post"]] = {
    Block: "pre", ResPostBlock: "post", EvaBlock: "pre", EvaBlockPostNorm: "post",
}  # fmt: skip

_HINTS = {
    "attn.gate": " (gated attention)",
    "attn.relative_position_bias_table": " (relative position bias)",
    "attn.rel_pos": " (relative position bias)",
}


def read_block(block: nn.Module) -> BlockSpec:
    """The spec of a float block of a VisionTransformer or Eva.

    Raises: UnsupportedBlockError, what of it has no int8 kernel.
    """
    order = BLOCKS.get(type(block))
    if order is None:
        names = ", ".join(kind.__name__ for kind in BLOCKS)
        raise UnsupportedBlockError(f"is a {type(block).__name__}, and INT8 knows {names}")
    reader = BlockReader(block, ("attn", "mlp", "ls1", "ls2"), _HINTS)
    is_eva = isinstance(block, EvaBlock | EvaBlockPostNorm)
    call = Call(("x", "rope", "attn_mask", "is_causal"), rope="rope")
    call = call if is_eva else Call(("x", "attn_mask", "is_causal"))
    spec = BlockSpec(
        attention=_attention(reader, call),
        mlp=_mlp(reader),
        norm_1=reader.norm("norm1"),
        norm_2=reader.norm("norm2"),
        scale_1=reader.tensor("gamma_1") or reader.tensor("ls1.gamma"),
        scale_2=reader.tensor("gamma_2") or reader.tensor("ls2.gamma"),
        call=call,
        order=order,
    )
    reader.require_all_named()
    return spec


def _attention(reader: BlockReader, call: Call) -> Attention:
    attn = cast(Any, reader.modules["attn"])
    kind = type(attn).__name__
    if kind not in ("Attention", "EvaAttention", "AttentionRope"):
        raise UnsupportedBlockError(f"has a {kind} as attn, for which INT8 has no kernel")
    H, d = int(attn.num_heads), int(attn.head_dim)
    if getattr(attn, "num_kv_heads", H) != H:
        raise UnsupportedBlockError(
            f"has {attn.num_kv_heads} heads of keys for {H} of queries, and INT8 takes as many"
        )
    has_rope = kind != "Attention"
    layout: Literal["half", "interleaved"]
    layout = "half" if getattr(attn, "rotate_half", False) else "interleaved"
    return Attention(
        path="attn",
        num_heads=H,
        head_dim=d,
        in_proj=Linear("attn.qkv", "in_proj", _qkv(reader, H * d)),
        out_proj=reader.linear("attn.proj", "out_proj"),
        call=call,
        rope=Rope(int(attn.num_prefix_tokens), layout) if has_rope else None,
        q_norm=reader.inner_norm("attn.q_norm"),
        k_norm=reader.inner_norm("attn.k_norm"),
        inner_norm=reader.inner_norm("attn.norm"),
    )


def _qkv(reader: BlockReader, width: int) -> tuple[Rows, ...]:
    """Queries, keys and values: one linear, one with biases apart, or three."""
    if not reader.has("attn.qkv"):
        return tuple(reader.rows(f"attn.{name}_proj") for name in "qkv")
    biases = [reader.tensor(f"attn.{name}_bias") for name in "qkv"]
    if not any(biases):
        return (reader.rows("attn.qkv"),)
    whole = reader.rows("attn.qkv")
    return tuple(
        Rows(whole.weight, bias, (i * width, (i + 1) * width)) for i, bias in enumerate(biases)
    )


def _mlp(reader: BlockReader) -> Mlp:
    mlp = cast(Any, reader.modules["mlp"])
    kind = type(mlp).__name__
    reader.named_modules.add("mlp.act")
    activation = activation_of(mlp.act) if hasattr(mlp, "act") else None
    is_gated = kind != "Mlp"
    if activation is None or activation not in (*ACTIVATIONS, *(("silu",) if is_gated else ())):
        name = type(getattr(mlp, "act", mlp)).__name__
        raise UnsupportedBlockError(f"has {name} as mlp.act, for which INT8 has no kernel")
    inner = reader.inner_norm("mlp.norm")
    if kind in ("Mlp", "GluMlp"):
        fc1, fc2 = reader.linear("mlp.fc1", "c_fc"), reader.linear("mlp.fc2", "c_proj")
        if is_gated and fc1.shape(reader.block)[0] % (2 * PANEL_N):
            raise UnsupportedBlockError(
                f"has a gated mlp.fc1 of {fc1.shape(reader.block)[0]} rows, and INT8 cuts it at"
                f" multiples of {PANEL_N}"
            )
        is_last = is_gated and bool(mlp.gate_last)
        return Mlp(fc1, fc2, activation, is_gated, is_last, inner_norm=inner)
    if kind == "SwiGLU":
        gate, fc1 = reader.linear("mlp.fc1_g", "c_fc"), reader.linear("mlp.fc1_x", "c_fc")
        fc2 = reader.linear("mlp.fc2", "c_proj")
        return Mlp(fc1, fc2, activation, True, gate=gate, inner_norm=inner)
    if kind == "GeGluMlp":
        gate, fc1 = reader.linear("mlp.w0", "c_fc"), reader.linear("mlp.w1", "c_fc")
        fc2 = reader.linear("mlp.w2", "c_proj")
        return Mlp(fc1, fc2, activation, True, gate=gate, input_norm=inner)
    raise UnsupportedBlockError(f"has a {kind} as mlp, for which INT8 has no kernel")


def activation_of(module: nn.Module) -> str | None:
    """The operators' name of what an activation module computes, "silu", or None."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    names = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
    return names.get(type(module).__name__)
