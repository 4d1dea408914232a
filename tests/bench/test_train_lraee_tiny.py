import json
from pathlib import Path

import open_clip
import pytest
import torch
import typer
from safetensors.torch import load_file

from bench import train_lraee_tiny as train
from lraee.data.classes import Classes
from tests.image_files import folder
from tests.support import assert_same

CLASSES = Classes(("n01", "n02"), ("cat", "dog"))
RECIPE = train.Recipe(steps=3, text_steps=2, batch=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> train.Data:
    root = folder(tmp_path_factory.mktemp("train") / "photos", count=5)
    return train.load_data(root, CLASSES, hold_out=5)


def trainer(out: Path, data: train.Data, recipe: train.Recipe = RECIPE) -> train.Trainer:
    out.mkdir(exist_ok=True)
    return train.Trainer(out, data, CLASSES, recipe)


def test_every_nth_photo_of_each_class_is_held_out(data: train.Data) -> None:
    assert data.images.shape == (8, 3, 64, 64) and data.images.dtype == torch.uint8
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert data.held_labels.tolist() == [0, 1]


def test_learning_rate_by_hand() -> None:
    recipe = train.Recipe(steps=1200, text_steps=1, warmup=200)
    rate = [train.learning_rate(step, 1200, recipe, 1.0) for step in (0, 99, 199, 200, 700, 1200)]
    assert rate == pytest.approx([1 / 200, 0.5, 1.0, 1.0, 0.5, 0.0])


def test_a_resumed_run_is_the_same_run(data: train.Data, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", data)
    straight.run()
    first = trainer(tmp_path / "resumed", data)
    first.advance()
    first._save()
    resumed = trainer(tmp_path / "resumed", data)
    resumed.run()
    for name, w in straight.model.state_dict().items():
        assert_same(resumed.model.state_dict()[name], w, name=name)
    with pytest.raises(typer.BadParameter, match="is of another recipe"):
        trainer(tmp_path / "resumed", data, train.Recipe(steps=4, text_steps=2, batch=4)).run()


def test_what_it_writes_is_an_open_clip_model(data: train.Data, tmp_path: Path) -> None:
    built = trainer(tmp_path / "mini", data)
    figures = built.finish()
    assert json.loads((tmp_path / "mini" / "train.json").read_text())["figures"] == figures
    open_clip.add_model_config(tmp_path / "mini" / "mini.json")
    weights = tmp_path / "mini" / "open_clip_model.safetensors"
    model = open_clip.create_model("mini", pretrained=str(weights))
    stored = load_file(weights)
    for name, w in model.state_dict().items():
        assert_same(w, stored[name].float(), name=name)
    assert model.logit_scale.exp().item() == pytest.approx(30.0, rel=1e-3)
