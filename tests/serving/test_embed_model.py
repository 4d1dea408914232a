import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lraee
from lraee.data.sources import DataError
from lraee.model.accelerate import accelerate
from lraee.serving.embed_model import Choice, PhotoModel, TextModel
from lraee.zoo.opening import open_model
from tests.exits.random_exits import make_exits
from tests.image_files import encoded

CHOICE = Choice("lraee-tiny", "0")


@pytest.fixture(scope="module")
def photos() -> PhotoModel:
    return PhotoModel(replace(CHOICE, mode="exact"))


def test_rows_are_those_of_encode_image(photos: PhotoModel) -> None:
    from lraee.data.photos import decode

    opened = open_model("lraee-tiny")
    data = [encoded(i, size=(200 + i, 150)) for i in range(3)]
    images = torch.stack([opened.preprocess(decode(each)) for each in data])
    with torch.inference_mode():
        expected = accelerate(opened.model).encode_image(images, normalize=True)
    rows = [photos.prepare(each) for each in data]
    embeddings, blocks = photos.encode(rows)
    assert np.array_equal(embeddings, expected.numpy()) and list(blocks) == [None] * 3
    assert [(row.width, row.height) for row in rows] == [(200, 150), (201, 150), (202, 150)]


def test_rows_have_the_same_bits_in_any_batch(photos: PhotoModel) -> None:
    rows = [photos.prepare(encoded(i)) for i in range(5)]
    together, _ = photos.encode(rows)
    for i, row in enumerate(rows):
        assert np.array_equal(photos.encode([row])[0][0], together[i])


def test_settings_tell_every_choice_apart(photos: PhotoModel) -> None:
    about = photos.settings
    assert about["kind"] == "photos" and about["dimensions"] == 256 and len(about["weights"]) == 64
    assert about["preprocess"]["mode"] == "exact" and about["scheme"]["attention"] == "int8"
    others = [
        replace(CHOICE, mode="fast"), replace(CHOICE, mode="exact", scheme="int8-patches"),
        replace(CHOICE, mode="exact", dtype="float16"), replace(CHOICE, mode="exact", version="1"),
    ]  # fmt: skip
    assert all(PhotoModel(other).settings != about for other in others)


def test_a_bad_photo_is_a_data_error(photos: PhotoModel) -> None:
    with pytest.raises(DataError, match="is not a whole image"):
        photos.prepare(b"nothing")


def test_decoding_threads_never_enter_openmp(photos: PhotoModel) -> None:
    """Each thread that enters it would start a team of its own beside the tower's."""
    data = encoded(0, size=(900, 700))

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.set_num_threads(4)
    photos.encode([photos.prepare(data)])
    recorded: list[int] = []
    release = threading.Event()

    def work() -> None:
        photos.prepare(data)
        recorded.append(threads())
        release.wait(20)

    before = threads()
    pool = [threading.Thread(target=work) for _ in range(3)]
    for thread in pool:
        thread.start()
    while len(recorded) < 3 and any(thread.is_alive() for thread in pool):
        pass
    count = threads()
    release.set()
    for thread in pool:
        thread.join()
    assert len(recorded) == 3 and count - before <= 3


def test_exit_blocks(tmp_path: Path) -> None:
    make_exits(open_model("lraee-tiny").model, blocks=(4, 8)).save(tmp_path / "exits")
    model = PhotoModel(replace(CHOICE, exits=tmp_path / "exits"))
    rows = [model.prepare(encoded(i)) for i in range(4)]
    embeddings, blocks = model.encode(rows)
    assert embeddings.shape == (4, 256) and set(blocks) <= {4, 8, 12}
    assert len(model.settings["exits"]) == 64


def test_texts() -> None:
    model = TextModel(CHOICE, batch=2)
    rows = [model.prepare(text.encode()) for text in ("a cat", "a dog")]
    embeddings, blocks = model.encode(rows)
    opened = open_model("lraee-tiny")
    with torch.inference_mode():
        tokens = opened.tokenizer(["a cat", "a dog"])
        expected = opened.model.encode_text(tokens, normalize=True)
    assert np.array_equal(embeddings, expected.numpy()) and list(blocks) == [None, None]
    assert model.settings["kind"] == "texts" and model.settings["batch"] == 2
    assert model.settings["weights"] != PhotoModel(CHOICE).settings["weights"]


def test_texts_by_an_int8_tower(tmp_path: Path) -> None:
    fast = lraee.accelerate(open_model("lraee-tiny").model, text="int8")
    lraee.save(fast, tmp_path)
    tokens = open_model("lraee-tiny").tokenizer(["a cat", "a dog"])
    with torch.inference_mode():
        expected = fast.encode_text(tokens, normalize=True).numpy()
    text = TextModel(CHOICE, batch=2)
    for choice in (replace(CHOICE, text="int8"), replace(CHOICE, checkpoint=tmp_path)):
        model = TextModel(choice, batch=2)
        embeddings, _ = model.encode([model.prepare(text) for text in (b"a cat", b"a dog")])
        assert np.array_equal(embeddings, expected)
        assert model.settings["weights"] == text.settings["weights"]
        assert model.settings["scheme"]["weights"] == "channel" and model.settings != text.settings
    assert "scheme" not in text.settings
