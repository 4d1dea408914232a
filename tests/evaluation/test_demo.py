import importlib.util
from dataclasses import replace

import pytest
import torch

from lraee.data.sources import DataError
from lraee.evaluation import demo
from lraee.towers.prompts import class_features
from lraee.zoo.opening import ModelError, Opened, open_model


@pytest.fixture(scope="module")
def tiny() -> Opened:
    return open_model("lraee-tiny")


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits from few crops and steps: what they know is not at stake."""
    monkeypatch.setattr(demo, "CROPS", 200)
    head = replace(demo.RECIPE.head, steps=20, hidden=64)
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, head=head, candidates=(6, 9)))


def test_the_sample_photos_are_real_and_all_there() -> None:
    photos = demo.sample_photos()
    assert sorted(photos.names) == sorted(demo.SAMPLES) and photos.skipped == []
    for i in range(len(photos)):
        image = photos.image(i)
        assert min(image.size) >= 200
        assert len(image.convert("L").getcolors() or []) > 100  # no drawing


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"--data FOLDER, or from scikit-image.*pip install"):
        demo.open_photos(None, 3)


def test_answers_are_those_of_a_plain_loop(tiny: Opened, short_training: None) -> None:
    photos = demo.sample_photos()
    photos.names, photos.labels = photos.names[:5], photos.labels[:5]
    result = demo.run(tiny, photos, names=("espresso", "obelisk", "tabby cat"), progress=False)
    rows = class_features(tiny.model, tiny.tokenizer, ("espresso", "obelisk", "tabby cat"))
    assert result["schema"] == "lraee.demo/2" and result["photos"] == 5 and result["classes"] == 3
    for i, answer in enumerate(result["answers"]):
        image = tiny.preprocess(photos.image(i))[None]
        with torch.inference_mode():
            y = tiny.model.encode_image(image, normalize=True)
            logits = tiny.model.logit_scale.exp() * y @ rows.T
        share, k = logits.softmax(dim=1)[0].max(dim=0)
        assert answer["photo"] == photos.names[i]
        assert answer["float_name"] == ("espresso", "obelisk", "tabby cat")[int(k)]
        assert answer["float_share"] == pytest.approx(share.item(), rel=1e-4)
        assert answer["int8_share"] == pytest.approx(share.item(), abs=0.05)


def test_lraee_tiny_sees_coffee_and_agrees_with_itself_in_int8(tiny: Opened) -> None:
    result = demo.run(tiny, demo.sample_photos(), progress=False)
    answers = {row["photo"]: row for row in result["answers"]}
    assert answers["coffee.png"]["float_name"] == answers["coffee.png"]["int8_name"] == "espresso"
    base, fast, exits = result["rows"]
    assert base["scheme"] == "float" and base["cosine_mean"] == pytest.approx(1.0)
    assert fast["scheme"] == "int8" and fast["cosine_p01"] > 0.999
    assert fast["weight_bytes"] < 0.3 * base["weight_bytes"]
    assert fast["agreement"] >= 100 * 12 / 13
    assert exits["scheme"] == "exits" and exits["flops_saved"] > 5 and exits["agreement"] > 50
    assert result["crops"] >= demo.CROPS and result["plan"]["exits"]
    depths = {row["exit_block"] for row in result["answers"]}
    assert depths <= {*result["plan"]["exits"], 12} and len(depths) >= 2


def test_models_that_cannot_be_had_are_one_line() -> None:
    for name, pretrained, message in (
        ("ViT-B-33", None, "name must be lraee-tiny or one of open_clip's, got 'ViT-B-33'"),
        ("ViT-B-32", None, "pretrained must be given for ViT-B-32, one of: openai, "),
        (
            "ViT-B-32",
            "nobody",
            "model: ViT-B-32 nobody cannot be had (no network, no such tag?); lraee-tiny needs",
        ),
    ):
        with pytest.raises(ModelError) as caught:
            open_model(name, pretrained)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_random_weights_only_where_asked_for(tiny: Opened) -> None:
    opened = open_model("ViT-S-32-alt", may_be_random=True)
    assert opened.title == "ViT-S-32-alt random weights" and not opened.model.training
    assert len(opened.class_names) == 1000 and len(tiny.class_names) == 200
