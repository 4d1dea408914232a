"""set_classes: other classes for the gate, the same heads, thresholds and embeddings."""

import copy
import gc
import math
import pickle
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lraee
from lraee.exits.plan import Plan
from lraee.model.set_classes import unit_classes
from tests.clip_models import CONTEXT, VOCABULARY, make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import TEXT_BOUND, assert_same, assert_within, generator

E = 24


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def fast(model: nn.Module) -> nn.Module:
    return lraee.accelerate(model, exits=make_exits(model, kind="confidence"))


def other_classes(k: int = 4, seed: int = 7) -> Tensor:
    return torch.randn(k, E, generator=generator(seed)) * 3


def tokenizer(texts: list[str]) -> Tensor:
    """One token per letter, padded with zeros."""
    rows = [[1 + ord(letter) % (VOCABULARY - 1) for letter in text][:CONTEXT] for text in texts]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


def classes_now(fast: nn.Module) -> Tensor:
    return fast.visual.exits.classes


@torch.no_grad()
def test_classes_change_who_leaves_and_not_what_a_head_says(fast: nn.Module) -> None:
    images = make_images(24)
    with lraee.trace(fast) as before:
        y = fast.encode_image(images)
    fast.set_classes(other_classes())
    with lraee.trace(fast) as after:
        z = fast.encode_image(images)
    assert not torch.equal(after.exit_block, before.exit_block), "no test otherwise"
    same = after.exit_block == before.exit_block
    assert 2 <= int(same.sum()) < 24
    assert_same(z[same], y[same])
    confidence, variance = before.features[:, 0, 0], before.features[:, 0, 2]
    assert not torch.equal(after.features[:, 0, 0], confidence)
    assert_same(after.features[:, 0, 2], variance)


@torch.no_grad()
def test_the_gate_looks_for_the_new_classes(model: nn.Module) -> None:
    """Confidence is the softmax over the new classes of what the head says."""
    images, classes = make_images(9), other_classes()
    exits = make_exits(model, kind="confidence")
    gate = replace(exits.plan.gate, thresholds=(-math.inf, 0.5))  # all leave at the first exit
    exits = replace(exits, plans={"confidence": Plan(exits.plan.blocks, gate)})
    fast = lraee.accelerate(model, exits=exits)
    fast.set_classes(classes.double())
    with lraee.trace(fast) as t:
        y = fast.encode_image(images)
    assert t.exit_block.tolist() == [1] * 9
    rows = F.normalize(classes.double(), dim=1)
    logits = 20.0 * F.normalize(y.double(), dim=1) @ rows.T  # random_exits' scale
    expected = torch.softmax(logits, dim=1).max(1).values
    # A logit is off by what float16 loses of a class; a softmax moves by half of that at most
    lost = 20.0 * 2.0**-11 * float((rows - rows.mean(0)).norm(dim=1).max())
    assert_within(t.features[:, 0, 0].double(), expected, lost / 2 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_classes_of_any_length_and_type(fast: nn.Module, dtype: torch.dtype) -> None:
    classes = other_classes().to(dtype).requires_grad_()
    fast.set_classes(classes)
    assert_same(classes_now(fast), unit_classes("x", classes.detach(), E))
    assert torch.allclose(classes_now(fast).norm(dim=1), torch.ones(4), atol=1e-6)
    assert torch.allclose(classes_now(fast), F.normalize(classes.float(), dim=1), atol=1e-6)
    assert not classes_now(fast).requires_grad


def test_texts(model: nn.Module, fast: nn.Module) -> None:
    texts = ["a photo of a dog", "a cat", "zebra"]
    fast.set_classes(texts, tokenizer)
    with torch.no_grad():
        whole = model.encode_text(tokenizer(texts), normalize=True)
        expected = fast.encode_text(tokenizer(texts), normalize=True)
    assert_same(classes_now(fast), unit_classes("x", expected, E))
    assert_within(expected, whole, TEXT_BOUND)
    fast.set_classes(("one",), tokenizer)
    assert classes_now(fast).shape == (1, E)


def test_classes_made_in_inference_mode(fast: nn.Module) -> None:
    with torch.inference_mode():
        fast.set_classes(other_classes())
    with torch.no_grad():
        expected = fast.encode_image(make_images(5))
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.float()):
            assert_same(twin.encode_image(make_images(5)).isfinite(), expected.isfinite())
    fast.set_classes(other_classes(2))
    assert classes_now(fast).shape == (2, E)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (torch.eye(3, E).long(), TypeError, "must be a float tensor .* got torch.int64"),
    "a row": (torch.ones(E), ValueError, r"must have shape \[K >= 1, E\] with E = 24, got \[24\]"),
    "none": (torch.ones(0, E), ValueError, r"got \[0, 24\]"),
    "other space": (torch.ones(2, E + 1), ValueError, r"got \[2, 25\]"),
    "zeros": (torch.zeros(2, E), ValueError, "must be finite and no row zero"),
    "nan": (torch.full((2, E), torch.nan), ValueError, "must be finite and no row zero"),
    "infinite": (torch.full((2, E), torch.inf), ValueError, "must be finite and no row zero"),
    "texts without tokenizer": (["a cat"], ValueError, "tokenizer must be given with texts"),
    "one text": ("a cat", TypeError, "a float tensor .* or a list of texts"),
    "numbers": ([1, 2], TypeError, "a float tensor .* or a list of texts"),
    "nothing": (None, TypeError, "a float tensor .* or a list of texts"),
    "an iterator": (iter(["a cat"]), TypeError, "a float tensor .* or a list of texts"),
    "no texts": ([], ValueError, "classes must be one text at least, got none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_leaves_the_old_classes(fast: nn.Module, case: str) -> None:
    classes, error, message = WRONG[case]
    before = classes_now(fast).clone()
    with pytest.raises(error, match=f"^set_classes: .*{message}"):
        fast.set_classes(classes)
    assert_same(classes_now(fast), before)


def test_a_tower_alone_has_no_texts(model: nn.Module) -> None:
    tower = lraee.accelerate(model.visual, exits=make_exits(model, kind="confidence"))
    tower.set_classes(other_classes())
    assert tower.exits.classes.shape == (4, E)
    with pytest.raises(ValueError, match="and the model have encode_text"):
        tower.set_classes(["a cat"], tokenizer)


@torch.no_grad()
def test_copies_have_classes_of_their_own(fast: nn.Module) -> None:
    fast.set_classes(other_classes(3))
    images = make_images(7)
    expected = fast.encode_image(images)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(twin.encode_image(images), expected)
        twin.set_classes(other_classes(6, seed=8))
        assert classes_now(twin).shape == (6, E) and classes_now(fast).shape == (3, E)
        twin.visual.set_classes(other_classes(2))
        assert classes_now(twin).shape == (2, E)
    assert_same(fast.encode_image(images), expected)


@torch.no_grad()
def test_saved_with_the_model(model: nn.Module, fast: nn.Module, tmp_path: Any) -> None:
    fast.set_classes(other_classes(3))
    lraee.save(fast, tmp_path)
    assert_same(classes_now(lraee.load(tmp_path, model)), classes_now(fast))


def test_a_model_is_freed_with_its_setter(model: nn.Module) -> None:
    fast = lraee.accelerate(model, exits=make_exits(model, kind="confidence"))
    dropped = weakref.ref(fast)
    gc.disable()
    try:
        del fast
        assert dropped() is None, "a cycle keeps the model until the garbage collector comes"
    finally:
        gc.enable()


def test_class_free_gates_take_classes_and_do_not_look_at_them(model: nn.Module) -> None:
    fast = lraee.accelerate(model, exits=make_exits(model, kind="agreement"))
    images = make_images(16)
    with torch.no_grad(), lraee.trace(fast) as before:
        y = fast.encode_image(images)
    fast.set_classes(other_classes())
    with torch.no_grad(), lraee.trace(fast) as after:
        assert_same(fast.encode_image(images), y)
    assert_same(after.exit_block, before.exit_block)
    assert_same(after.scores, before.scores)
    assert len(set(before.exit_block.tolist())) >= 2
