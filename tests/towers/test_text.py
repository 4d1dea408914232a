"""Text towers: found, read, cut at the end of the text; in int8, the same bits in any batch."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers.text import find_text
from lraee.towers.text_encoder import TextEncoder
from tests.clip_models import make_model
from tests.support import TEXT_BOUND, assert_same, assert_within, generator

CONTEXT, VOCABULARY, END = 24, 64, 63
TEXT: dict[str, Any] = {"context_length": CONTEXT, "layers": 2}
FLAT: dict[str, Any] = {"text": TEXT}
CUSTOM: dict[str, Any] = {"text": TEXT, "custom_text": True}
CUT: dict[str, dict[str, Any]] = {
    "flat": FLAT,
    "custom": CUSTOM,
    "flat, end id": {"text": {**TEXT, "pool_type": "eos", "eos_id": END}},
    "custom, end id": {"text": {**TEXT, "pool_type": "eos", "eos_id": END}, "custom_text": True},
    "custom, first": {"text": {**TEXT, "pool_type": "first"}, "custom_text": True},
    "linear projection": {"text": {**TEXT, "proj_bias": True}, "custom_text": True},
    "no projection": {"text": {**TEXT, "proj_type": "none"}, "custom_text": True, "embed_dim": 32},
    "layer scale": {"text": {**TEXT, "ls_init_value": 0.3}},
    "quick_gelu": {"text": TEXT, "quick_gelu": True},
}
WHOLE: dict[str, dict[str, Any]] = {
    "last": {"text": {**TEXT, "pool_type": "last"}, "custom_text": True},
    "no mask": {"text": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "siglip": {
        "text": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "custom_text": True,
    },
}
FLOAT_ONLY: dict[str, dict[str, Any]] = {
    "class token": {"text": {**TEXT, "embed_cls": True}, "custom_text": True},
    "tokens": {"text": {**TEXT, "output_tokens": True}, "custom_text": True},
}  # fmt: skip


def make_prompts(lengths: list[int], seed: int = 0) -> Tensor:
    """Ids [n, CONTEXT]: words, the highest id as the last of each length, then zeros."""
    ids = torch.randint(1, END, (len(lengths), CONTEXT), generator=generator(seed))
    for row, n in zip(ids, lengths, strict=True):
        row[n - 1], row[n:] = END, 0
    return ids


def watched_lengths(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the ids that the token embedding is called with; no hook, which stops the cut."""
    tower = find_text(model)
    assert tower is not None
    embedding, shapes = tower.owner.get_submodule("token_embedding"), []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return nn.Embedding.forward(embedding, ids)

    embedding.forward = forward
    return shapes


def encode(model: nn.Module, ids: Tensor, **options: bool) -> Tensor:
    with torch.no_grad():
        return model.encode_text(ids, **options)


# The cut of a float tower


@pytest.mark.parametrize("variant", CUT.values(), ids=CUT)
def test_a_float_tower_is_cut_after_the_last_end(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    fast = lraee.accelerate(model)
    ids = make_prompts([5, 9, 3, 7])
    shapes = watched_lengths(fast)
    result = encode(fast, ids)
    is_first = variant["text"].get("pool_type") == "first"
    assert shapes == [(4, 1 if is_first else 9)]
    assert_within(result, encode(model, ids), TEXT_BOUND)
    assert_within(encode(fast, ids, normalize=True), encode(model, ids, normalize=True), TEXT_BOUND)
    assert_within(fast(None, ids)[1], model(None, ids)[1].detach(), TEXT_BOUND)
    assert encode(fast, ids[:1]).shape == result[:1].shape


@pytest.mark.parametrize("variant", (WHOLE | FLOAT_ONLY).values(), ids=WHOLE | FLOAT_ONLY)
def test_other_float_towers_run_as_before(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    fast = lraee.accelerate(model)
    ids = make_prompts([5, 9, 3])
    with torch.no_grad():
        expected, result = model.text(ids), fast.text(ids)
    pair = (expected, result) if isinstance(expected, tuple) else ((expected,), (result,))
    for wanted, actual in zip(*pair, strict=True):
        assert_same(actual, wanted)


def test_a_text_without_an_end_is_cut_where_the_library_pools() -> None:
    ids = make_prompts([5, 9])
    ids[0] = 7  # no end: open_clip pools the first token
    for variant in (CUT["flat, end id"], FLAT):
        model = make_model(**variant)
        assert_within(encode(lraee.accelerate(model), ids), encode(model, ids), TEXT_BOUND)


def test_gradients_reach_a_cut_tower() -> None:
    model = make_model(**FLAT)
    fast, ids = lraee.accelerate(model), make_prompts([4, 6])
    for each in (model, fast):
        each.encode_text(ids).square().sum().backward()
    result, expected = fast.ln_final.weight.grad, model.ln_final.weight.grad
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [None, "int8"])
@pytest.mark.parametrize("variant", [FLAT, CUSTOM], ids=["flat", "custom"])
def test_a_hook_is_given_whole_texts(variant: dict[str, Any], text: str | None) -> None:
    fast = lraee.accelerate(make_model(**variant), text=text)
    tower, ids, shapes = find_text(fast), make_prompts([5, 9]), []
    expected = encode(fast, ids)
    assert tower is not None
    handle = tower.blocks[0].mlp.register_forward_hook(lambda m, a, y: shapes.append(y.shape))
    result = encode(fast, ids)
    handle.remove()
    assert shapes == [(2, CONTEXT, 32)]
    assert_within(result, expected, TEXT_BOUND if text is None else 0.1)
    assert_same(encode(fast, ids), expected)


@pytest.mark.parametrize("text", [None, "int8"])
@pytest.mark.parametrize("variant", [FLAT, CUSTOM], ids=["flat", "custom"])
def test_wrong_ids_are_refused_by_the_library(variant: dict[str, Any], text: str | None) -> None:
    model = make_model(**variant)
    fast = lraee.accelerate(model, text=text)
    for ids in (make_prompts([5])[:, : CONTEXT - 1], torch.zeros(2, CONTEXT)):
        for each in (model, fast):
            with pytest.raises((RuntimeError, ValueError)):
                each.encode_text(ids)
    assert encode(fast, make_prompts([])).shape == (0, 24)


def test_a_class_of_its_own_is_left_alone() -> None:
    model = make_model(**FLAT)

    class Other(type(model)):  # type: ignore[misc]
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            return super().encode_text(text, normalize) * 2

    model.__class__ = Other
    assert find_text(model) is None
    ids = make_prompts([5, 9])
    assert_same(encode(lraee.accelerate(model), ids), encode(model, ids))


def test_positions_by_hand() -> None:
    ids = torch.tensor([[1, 9, 2, 9], [5, 4, 3, 2], [1, 2, 7, 8]])
    tower = find_text(make_model(**FLAT))
    assert tower is not None and tower.spec.pooling == "argmax" and tower.spec.is_cut
    wanted = {"argmax": [1, 0, 3], "end": [0, 0, 2], "first": [0, 0, 0], "last": [3, 3, 3]}
    for pooling, expected in wanted.items():
        spec = replace(tower.spec, pooling=pooling, end_id=7)
        assert spec.positions(ids).tolist() == expected


# INT8


@pytest.mark.parametrize("variant", (CUT | WHOLE).values(), ids=CUT | WHOLE)
def test_a_text_has_the_same_bits_in_any_batch(variant: dict[str, Any]) -> None:
    fast = lraee.accelerate(make_model(**variant), text="int8")
    lengths = [3, 5, 5, 9, 12, CONTEXT, 2]
    ids = make_prompts(lengths)
    threads = torch.get_num_threads()
    source = random.Random(0)
    try:
        torch.set_num_threads(1)
        alone = torch.cat([encode(fast, row[None], normalize=True) for row in ids])
        for number in (1, 2):
            torch.set_num_threads(number)
            for B in (2, 3, 8, 17):
                picks = [source.randrange(len(ids)) for _ in range(B)]
                assert_same(encode(fast, ids[picks], normalize=True), alone[picks], picks=picks)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["flat", "custom", "flat, end id"])
def test_what_stands_after_the_end_changes_nothing(name: str) -> None:
    fast = lraee.accelerate(make_model(**CUT[name]), text="int8")
    lengths = [3, 5, 9]
    ids = make_prompts(lengths)
    other = torch.randint(1, END, ids.shape, generator=generator(5))
    for row, n in zip(other, lengths, strict=True):
        row[:n] = 0
    assert_same(encode(fast, ids + other), encode(fast, ids))


def test_texts_of_one_length_run_together() -> None:
    fast = lraee.accelerate(make_model(**FLAT), text="int8")
    shapes = watched_lengths(fast)
    encode(fast, make_prompts([5, 9, 5, 3, 16, 8]))
    assert shapes == [(4, 8), (2, 16)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_text(bad: float) -> None:
    fast = lraee.accelerate(make_model(**FLAT), text="int8")
    ids = make_prompts([5, 5, 9])
    ids[1, 2], ids[ids == 62] = 62, 61
    ids[1, 2] = 62
    expected = encode(fast, ids)
    with torch.no_grad():
        fast.token_embedding.weight[62, 3] = bad
    result = encode(fast, ids)
    assert_same(result[[0, 2]], expected[[0, 2]])
    assert result[1].isnan().all()


@pytest.mark.parametrize("variant", (CUT | WHOLE).values(), ids=CUT | WHOLE)
def test_int8_agrees_with_float(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    fast = lraee.accelerate(model, text="int8")
    ids = make_prompts([3, 5, 9, 12])
    cosine = nn.functional.cosine_similarity(encode(fast, ids), encode(model, ids))
    assert cosine.min() > 0.998
    tower = find_text(fast)
    assert tower is not None and all(block.can_fuse for block in tower.blocks)
    name = {"encode_text": "encode_text", "forward": "text_encoder"}[tower.spec.method]
    assert isinstance(tower.owner.__dict__[name], TextEncoder)


def test_intermediates_run_in_int8() -> None:
    model = make_model(**FLAT)
    fast, ids = lraee.accelerate(model, text="int8"), make_prompts([3, 5])
    with torch.no_grad():
        expected = model.forward_intermediates(text=ids)["text_features"]
        result = fast.forward_intermediates(text=ids)["text_features"]
    assert nn.functional.cosine_similarity(result, expected).min() > 0.998


@pytest.mark.parametrize("text", [None, "int8"])
@pytest.mark.parametrize("variant", [FLAT, CUSTOM], ids=["flat", "custom"])
def test_compiled(variant: dict[str, Any], text: str | None) -> None:
    fast, ids = lraee.accelerate(make_model(**variant), text=text), make_prompts([5, 9, 3])
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        result, expected = compiled(None, ids)[1], fast(None, ids)[1]
    assert_within(result, expected, TEXT_BOUND if text is None else 0.0)
