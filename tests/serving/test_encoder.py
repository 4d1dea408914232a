"""A model as it is served: names, schemes, exits."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lraee import zoo
from lraee.data.preprocess import from_transform
from lraee.exits.bundle import Exits, Plan
from lraee.model.accelerate import accelerate
from lraee.model.trace import trace
from lraee.serving.encoder import ClipEncoder, ModelChoice
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from lraee.zoo.opening import ModelError, Opened
from tests.exits.random_exits import make_exits
from tests.serving.conftest import PATIENT, running


def test_images_have_the_same_bits_in_any_batch(
    encoder: ClipEncoder, photo_files: dict[str, bytes]
) -> None:
    images = [encoder.preprocess(data) for data in photo_files.values()]
    together = encoder.encode("image", images)
    for image, result in zip(images, together, strict=True):
        assert np.array_equal(encoder.encode("image", [image])[0].embedding, result.embedding)
        assert result.exit_block is None


def test_float_is_the_model_itself(photo_files: dict[str, bytes]) -> None:
    served = ModelChoice("lraee-tiny", scheme="float", mode="exact").open()
    model: Any = zoo.load("lraee-tiny")[0]
    image = served.preprocess(photo_files["coffee.png"])
    with torch.inference_mode():
        expected = model.encode_image(image[None], normalize=True)[0].numpy()
    assert np.array_equal(served.encode("image", [image])[0].embedding, expected)
    assert served.weights is None


def test_names_with_a_tag_open_those_weights() -> None:
    with pytest.raises(ModelError, match="ViT-B-32 no-such-tag"):
        ModelChoice("ViT-B-32__no-such-tag").open()


def _at_medians(model: Any, exits: Exits, images: torch.Tensor) -> Exits:
    """Thresholds at which half of the images that come to an exit leave there."""
    never = replace(exits.plan.gate, thresholds=(math.inf,) * len(exits.plan.blocks))
    exits = replace(exits, plans={exits.chosen: Plan(exits.plan.blocks, never)})
    fast: Any = accelerate(model, exits=exits)
    with trace(fast) as t, torch.inference_mode():
        fast.encode_image(images)
    medians = tuple(float(column.median()) for column in t.scores.T)
    gate = replace(never, thresholds=medians)
    return replace(exits, plans={exits.chosen: Plan(exits.plan.blocks, gate)})


def test_exits_are_served_and_counted(tmp_path: Path, photo_files: dict[str, bytes]) -> None:
    model = zoo.load("lraee-tiny")[0]
    exits = make_exits(model, kind="learned", blocks=(2, 4))
    preprocess = from_transform(zoo.load("lraee-tiny")[1], mode="fast")
    images = [preprocess(data) for data in photo_files.values()]
    _at_medians(model, exits, torch.stack(images)).save(tmp_path)
    encoder = ModelChoice("lraee-tiny", exits=tmp_path).open()
    alone = [encoder.encode("image", [image])[0] for image in images]
    assert len({result.exit_block for result in alone}) > 1
    with running(create_app([encoder], Settings(**PATIENT))) as server, server.client() as client:
        files = [("image", ("photo", data)) for data in photo_files.values()]
        form = {"model": "lraee-tiny"}
        rows = client.post("/v1/embeddings", data=form, files=files).json()["data"]
        metrics = client.get("/metrics").text
    for row, result in zip(rows, alone, strict=True):
        assert row["exit_block"] == result.exit_block
        assert np.array_equal(np.array(row["embedding"], np.float32), result.embedding)
    # two black images of the warm-up leave somewhere too
    counted = sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("lraee_exits_total{")
    )
    assert counted == len(images) + 2
    for block, count in Counter(result.exit_block for result in alone).items():
        assert f'lraee_exits_total{{block="{block}",model="lraee-tiny"}}' in metrics and count


def test_int8_texts_have_the_same_bits_in_any_batch() -> None:
    """`lraee serve --text int8`: texts go together, and a row is that of the text alone."""
    encoder = ModelChoice("lraee-tiny", text="int8").open()
    texts = ["a dog", "a photo of a red truck on a road", "art", "a dog", "a bowl of soup"]
    alone = [encoder.encode("text", [text])[0] for text in texts]
    assert encoder.batch_limit("text") > len(texts)
    with running(create_app([encoder], Settings(**PATIENT))) as server, server.client() as client:
        answer = client.post("/v1/embeddings", json={"model": "lraee-tiny", "input": texts}).json()
    for row, result in zip(answer["data"], alone, strict=True):
        assert np.array_equal(np.array(row["embedding"], np.float32), result.embedding)
    tokens = encoder.opened.tokenizer(texts).count_nonzero()
    assert answer["usage"]["prompt_tokens"] == sum(r.tokens for r in alone) == int(tokens)
    floats = ModelChoice("lraee-tiny").open().encode("text", texts)
    cosines = [a.embedding @ b.embedding for a, b in zip(alone, floats, strict=True)]
    assert 0.99 < min(cosines) < 1


class _Words:
    """A tokenizer as open_clip holds one of transformers: it pads with 1, as RoBERTa's."""

    tokenizer = SimpleNamespace(pad_token_id=1, eos_token_id=2)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ids = torch.ones(len(texts), 14, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            n = len(text.split())
            row[0], row[1 : n + 1], row[n + 1] = 0, 7, 2
        return ids


def test_tokens_are_counted_by_the_padding_of_the_tokenizer() -> None:
    from tests.towers.text_models import hf_encoder

    model: Any = hf_encoder()
    preprocess = zoo.load("lraee-tiny")[1]
    opened = Opened("tiny", model, preprocess, preprocess, _Words(), ())
    fast = accelerate(model, text="int8")
    encoder = ClipEncoder("tiny", opened, fast, is_text_invariant=True)
    results = encoder.encode("text", ["one", "two words", "three small words"])
    assert [result.tokens for result in results] == [3, 4, 5]
