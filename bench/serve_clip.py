"""lraee-tiny in the form of transformers: python -m bench.serve_clip FOLDER.

The same weights for servers that read transformers' CLIPModel alone (infinity-emb), with their
tokenizer and preprocessing, for bench.serve_load.
"""

import json
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lraee import zoo
from lraee.towers.hub import Tokenizer

_PARTS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}


def convert(name: str = "lraee-tiny") -> tuple[CLIPModel, Tokenizer]:
    """A CLIPModel with the weights of a model of the zoo, and that model's own tokenizer."""
    model, _, tokenizer = zoo.load(name)
    visual: Any = model.visual
    tower = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    text_width, width = model.token_embedding.weight.shape[1], model.text_projection.shape[1]
    config = CLIPConfig(
        projection_dim=width,
        text_config={
            **tower, **_sizes(model.transformer), "hidden_size": text_width,
            "max_position_embeddings": model.context_length, "vocab_size": model.vocab_size,
            "bos_token_id": tokenizer.sot_token_id, "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id, "projection_dim": width,
        },
        vision_config={
            **tower, **_sizes(visual.transformer), "hidden_size": visual.conv1.out_channels,
            "image_size": visual.image_size[0], "patch_size": visual.patch_size[0],
            "projection_dim": width,
        },
    )  # fmt: skip
    converted = CLIPModel(config).eval()
    weights = dict(_renamed(model.state_dict()))
    report = converted.load_state_dict(weights, strict=False)
    missing = [key for key in report.missing_keys if not key.endswith("position_ids")]
    assert not missing and not report.unexpected_keys, (missing, report.unexpected_keys)
    return converted, tokenizer


def _sizes(transformer: Any) -> dict[str, int]:
    block = transformer.resblocks[0]
    return {
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
    }


def _renamed(state: dict[str, Tensor]) -> Any:
    for name, value in state.items():
        if name in _NAMES:
            yield _NAMES[name], value
        elif name in _TRANSPOSED:
            yield _TRANSPOSED[name], value.T.contiguous()
        elif "resblocks." in name:
            index, part = name.partition("resblocks.")[2].split(".", 1)
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            yield from _block(f"{tower}.encoder.layers.{index}", part, value)


def _block(layer: str, part: str, value: Tensor) -> Any:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        for name, third in zip(("q", "k", "v"), value.chunk(3), strict=True):
            yield f"{layer}.self_attn.{name}_proj.{kind}", third.contiguous()
        return
    module, _, kind = part.rpartition(".")
    yield f"{layer}.{_PARTS[module]}.{kind}", value


def write(folder: Path, name: str = "lraee-tiny") -> None:
    """Model, tokenizer and preprocessing as files that transformers reads."""
    model, tokenizer = convert(name)
    model.save_pretrained(folder)
    own: Any = tokenizer
    merges = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    end = "<end_of_text>" if "<end_of_text>" in own.encoder else "<|endoftext|>"
    start = end.replace("end", "start")
    files: dict[str, Any] = {
        "vocab.json": own.encoder,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": own.context_length,
            "bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor",
            "do_resize": True, "size": {"shortest_edge": 64}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
            "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    }  # fmt: skip
    for path, value in files.items():
        (folder / path).write_text(json.dumps(value))


def main(folder: Path) -> None:
    """Write FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        write(folder)


if __name__ == "__main__":
    typer.run(main)
