"""One text tower in two libraries."""

from typing import Any, cast

from torch import Tensor, nn

_SMALL_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


def as_transformers(model: nn.Module) -> nn.Module:
    """The CLIPModel of transformers with the text tower of an open_clip CLIP, the same numbers.

    Its vision model is a small one with random weights.
    """
    import transformers

    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    vocabulary, D = state["token_embedding.weight"].shape
    first = cast(Any, model).transformer.resblocks[0]
    act = "quick_gelu" if type(first.mlp.gelu).__name__ == "QuickGELU" else "gelu"
    text = {
        "hidden_size": D, "intermediate_size": first.mlp.c_fc.out_features, "hidden_act": act,
        "num_attention_heads": first.attn.num_heads, "vocab_size": vocabulary,
        "num_hidden_layers": len(cast(Any, model).transformer.resblocks),
        "max_position_embeddings": len(state["positional_embedding"]), "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=_SMALL_VISION,
        projection_dim=state["text_projection"].shape[1],
    )  # fmt: skip
    result = transformers.CLIPModel(config).eval().requires_grad_(False)
    kept = {k: v for k, v in result.state_dict().items() if not k.startswith("text_")}
    result.load_state_dict(kept | dict(_renamed(state)))
    return result


def _renamed(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    names = {
        "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
        "ln_1": "layer_norm1", "ln_2": "layer_norm2",
    }  # fmt: skip
    renamed = [
        ("text_model.embeddings.token_embedding.weight", state["token_embedding.weight"]),
        ("text_model.embeddings.position_embedding.weight", state["positional_embedding"]),
        ("text_model.final_layer_norm.weight", state["ln_final.weight"]),
        ("text_model.final_layer_norm.bias", state["ln_final.bias"]),
        ("text_projection.weight", state["text_projection"].t()),
    ]
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        i, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        layer = f"text_model.encoder.layers.{i}"
        if rest.startswith("attn.in_proj"):
            kind = rest.removeprefix("attn.in_proj_")
            parts = zip("qkv", value.chunk(3), strict=True)
            renamed += [(f"{layer}.self_attn.{q}_proj.{kind}", part) for q, part in parts]
        else:
            module, _, kind = rest.rpartition(".")
            renamed.append((f"{layer}.{names[module]}.{kind}", value))
    return renamed
