import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from lraee import zoo
from lraee.data.photos import decode
from lraee.towers.prompts import class_features
from tests.image_files import encoded
from tests.support import assert_same


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.nn.Module, zoo.Preprocess, zoo.Tokenizer]:
    return zoo.load("lraee-tiny")


def test_it_is_an_eval_float32_clip_of_the_card(tiny) -> None:
    model, _, tokenizer = tiny
    assert type(model) is open_clip.CLIP and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.visual.transformer.resblocks) == 12
    assert model.visual.positional_embedding.shape == (50, 192)
    assert tokenizer(["a photo of a goldfish."]).shape == (1, 24)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(30.0), rtol=1e-3, atol=0)


def test_open_clip_builds_the_same_model(tiny) -> None:
    weights = zoo.register("lraee-tiny")
    model, _, preprocess = open_clip.create_model_and_transforms("lraee-tiny", pretrained=weights)
    x = torch.rand(2, 3, 56, 56)
    assert_same(model.eval().encode_image(x), tiny[0].encode_image(x))
    tokens = open_clip.get_tokenizer("lraee-tiny")(["a cat"])
    assert_same(tokens, tiny[2](["a cat"]))
    assert zoo.register("lraee-tiny") == weights
    assert open_clip.list_models().count("lraee-tiny") == 1


def test_preprocess_is_resize_64_crop_56(tiny) -> None:
    photo = decode(encoded(1, "PNG", (96, 64)))
    x = tiny[1](photo)
    # 96 x 64 stays: the shorter side is 64 already; the crop starts at (20, 4)
    crop = torch.from_numpy(np.array(photo.crop((20, 4, 76, 60))))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)
    expected = (crop.float().div(255).sub(mean).div(std)).permute(2, 0, 1)
    assert_same(x, expected.contiguous())
    assert tiny[1](photo.convert("L")).shape == (3, 56, 56)


def test_it_has_learned_its_words(tiny) -> None:
    """Two prompts of one word lie nearer to each other than to prompts of other words."""
    names = zoo.class_names("lraee-tiny")
    assert len(names) == len(set(names)) == 200 and names[:2] == ("goldfish", "fire salamander")
    rows = [
        class_features(tiny[0], tiny[2], names[:20], templates=(template,), progress=False)
        for template in (lambda c: f"a photo of the {c}.", lambda c: f"a sculpture of a {c}.")
    ]
    assert (rows[0] @ rows[1].T).argmax(dim=1).tolist() == list(range(20))


def test_unknown_names_are_one_line() -> None:
    for call in (zoo.load, zoo.register, zoo.directory, zoo.class_names):
        with pytest.raises(ValueError) as caught:
            call("lraee-huge")
        assert str(caught.value) == "zoo: name must be one of lraee-tiny, got 'lraee-huge'"


def test_changed_or_missing_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "lraee-tiny"
    shutil.copytree(zoo.directory("lraee-tiny"), copy)
    monkeypatch.setattr(zoo, "directory", lambda name: copy)
    weights = copy / "open_clip_model.safetensors"
    zoo.register("lraee-tiny")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RuntimeError, match="must have sha256 bcac6005.*changed or cut") as caught:
        zoo.load("lraee-tiny")
    assert "\n" not in str(caught.value)
    weights.write_bytes(data[:1000])
    with pytest.raises(RuntimeError, match="changed or cut"):
        zoo.load("lraee-tiny")
    weights.unlink()
    with pytest.raises(RuntimeError, match="got no such file; install lraee again"):
        zoo.load("lraee-tiny")


def test_import_opens_none_of_its_files() -> None:
    code = """
import sys
opened = []
sys.addaudithook(lambda name, args: opened.append(str(args[0])) if name == "open" else None)
import lraee.zoo
print([path for path in opened if "lraee-tiny" in path])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
