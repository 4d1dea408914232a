"""lraee-tiny in the form of transformers: python -m bench.serve_clip FOLDER.

The same weights for servers that read transformers' CLIPModel alone (infinity-emb), with their
tokenizer and preprocessing, for bench.serve_load.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lraee import zoo

_NAMES = Path(__file__).parent / "golden" / "clip_model_names.json"
"""Patterns of open_clip's names, and transformers' name; {qkv} takes thirds of the rows."""
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")


def convert(name: str = "lraee-tiny") -> tuple[CLIPModel, Any]:
    """A CLIPModel with the weights of a model of the zoo, and that model's own tokenizer."""
    model, _, tokenizer = zoo.load(name)
    own: Any = tokenizer
    config = json.loads((zoo.directory(name) / f"{name}.json").read_text())
    image, text, width = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": width}
    converted = CLIPModel(
        CLIPConfig(
            projection_dim=width,
            text_config={
                **shared, **_sizes(text, text["heads"]), "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "bos_token_id": own.sot_token_id, "eos_token_id": own.eot_token_id,
                "pad_token_id": own.eot_token_id,
            },
            vision_config={
                **shared, **_sizes(image, image["width"] // image["head_width"]),
                "image_size": image["image_size"], "patch_size": image["patch_size"],
            },
        )
    ).eval()  # fmt: skip
    missing, unexpected = converted.load_state_dict(
        dict(_renamed(model.state_dict())), strict=False
    )
    assert not unexpected and all(key.endswith("position_ids") for key in missing)
    return converted, own


def _sizes(tower: dict[str, int], heads: int) -> dict[str, int]:
    return {
        "hidden_size": tower["width"], "intermediate_size": 4 * tower["width"],
        "num_hidden_layers": tower["layers"], "num_attention_heads": heads,
    }  # fmt: skip


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    patterns = json.loads(_NAMES.read_text())
    for name, value in state.items():
        matches = ((re.fullmatch(pattern, name), theirs) for pattern, theirs in patterns)
        key = next((match.expand(theirs) for match, theirs in matches if match), None)
        if key is None:
            raise ValueError(f"serve_clip: {_NAMES.name} must name every weight, got {name}")
        if "{qkv}" in key:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                yield key.replace("{qkv}", letter), third.contiguous()
        else:
            yield key, value.T.contiguous() if key in _TRANSPOSED else value


def write(folder: Path, name: str = "lraee-tiny") -> None:
    """Model, tokenizer and preprocessing as files that transformers reads."""
    model, own = convert(name)
    model.save_pretrained(folder)
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
