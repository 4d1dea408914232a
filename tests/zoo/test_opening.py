"""A model from a folder that bench/train_lraee_tiny.py made."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bench.train_lraee_tiny import config_of
from lraee.zoo.opening import ModelError, open_model
from tests.support import assert_same


def write_model(folder: Path) -> nn.Module:
    """A random one of the trainer's own shape, two blocks deep."""
    folder.mkdir()
    config = config_of(64)
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = 2, 1
    path = folder / f"{folder.name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = open_clip.create_model(folder.name)
    weights = {name: each.half().contiguous() for name, each in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    built = write_model(tmp_path / "other-tiny")
    opened = open_model(str(tmp_path / "other-tiny"))
    assert opened.title == "other-tiny" and not opened.model.training
    for name, tensor in opened.model.state_dict().items():
        assert_same(tensor, built.state_dict()[name].half().to(tensor.dtype), name=name)
    image = Image.new("RGB", (80, 100), (10, 200, 30))
    assert opened.preprocess(image).shape == (3, 56, 56)
    assert_same(opened.with_margin(image)[:, 4:60, 4:60], opened.preprocess(image))
    assert opened.tokenizer(["a cat"]).shape == (1, 24)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"must hold {tmp_path.name}.json"):
        open_model(str(tmp_path))
    (tmp_path / f"{tmp_path.name}.json").write_text("{}")
    with pytest.raises(ModelError, match="must hold open_clip_model.safetensors"):
        open_model(str(tmp_path))
