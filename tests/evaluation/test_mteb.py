"""MTEB's own evaluation of its small local tasks, with a model of lraee's."""

import numpy as np
import pytest
import torch
from PIL import Image

from lraee.model.accelerate import accelerate
from lraee.zoo.opening import open_model
from tests.image_files import photo

mteb = pytest.importorskip("mteb", reason="needs MTEB: pip install 'lraee[mteb]'")


def test_rows_are_those_of_the_model() -> None:
    from lraee.evaluation.mteb import model_meta

    meta = model_meta("lraee-tiny")
    assert meta.name == "lraee/lraee-tiny-int8"
    encoder = meta.load_model(device="cpu")
    images: list[Image.Image] = [photo(i) for i in range(3)]
    opened = open_model("lraee-tiny")
    fast = accelerate(opened.model)
    with torch.inference_mode():
        rows = torch.stack([opened.preprocess(image) for image in images])
        expected = fast.encode_image(rows, normalize=True).numpy()
        texts = fast.encode_text(opened.tokenizer(["a", "b", "c"]), normalize=True).numpy()
    batches = [{"image": images[:2]}, {"image": images[2:]}]
    assert np.array_equal(encoder.encode(batches), expected)
    both = encoder.encode([{"image": images, "text": ["a", "b", "c"]}])
    assert np.array_equal(both, expected + texts)


def test_mteb_evaluates_it_on_local_photos() -> None:
    from lraee.evaluation.mteb import model_meta

    tasks = pytest.importorskip(
        "mteb.mocks.mock_tasks", reason="needs the mock tasks of MTEB 2.26 or newer"
    )
    task = tasks.MockZeroShotClassificationTask()
    result = mteb.evaluate(
        model_meta("lraee-tiny"), task, cache=None, show_progress_bar=False, co2_tracker=False
    )
    assert result.model_name == "lraee/lraee-tiny-int8"
    assert 0 <= result.task_results[0].get_score() <= 1
