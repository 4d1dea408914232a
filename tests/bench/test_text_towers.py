"""The zoo's text tower in transformers: the same weights, the same numbers."""

import pytest
import torch

import lraee
from bench.text_towers import encode_transformers, open_tower
from lraee import zoo
from lraee.towers.families import encode_text
from tests.support import TEXT_BOUND, assert_same, assert_within
from tests.towers.same_text import as_transformers

pytest.importorskip("transformers", reason="transformers is not installed")
TEXTS = ["a dog", "a photo of a red truck on a road", "art of the great owl", "soup"]


def test_one_tower_in_two_libraries() -> None:
    model, _, tokenizer = zoo.load("lraee-tiny")
    ids, other = tokenizer(TEXTS), as_transformers(model)
    with torch.no_grad():
        assert_within(encode_text(other, ids), encode_text(model, ids), TEXT_BOUND)
        fast, own = (lraee.accelerate(m, text="int8") for m in (model, other))
        assert_same(encode_text(own, ids), encode_text(fast, ids))
        user_s = torch.nn.functional.normalize(encode_transformers(own, ids), dim=-1)
        cosine = torch.nn.functional.cosine_similarity(user_s, encode_text(model, ids))
    assert cosine.min() > 0.99


def test_a_batch_is_padded_to_its_longest() -> None:
    tower = open_tower("lraee-tiny", 8)
    assert tower.batch(3).shape == (3, tower.texts.shape[1]) and tower.padding_id is None
