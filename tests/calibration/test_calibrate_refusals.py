"""calibrate refuses in one line what it cannot use."""

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers.state import tower_hash
from tests.small_calibration import (
    QUICK,
    E,
    N,
    assert_same_exits,
    calibrated,
    pictures,
    small_clip,
)
from tests.support import assert_same


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures()


def refusals() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    texts, labels = torch.eye(5, E), torch.zeros(N, dtype=torch.int64)
    head = QUICK.head
    return {
        "no such recipe": ({"recipe": "worst"}, ValueError, "recipe must be one of best, paper or"),
        "paper without labels": (
            {"recipe": "paper", "classes": texts}, ValueError,
            "labels must be given for training 'both', got None",
        ),
        "training without labels": (
            {"training": "labels"}, ValueError, "labels must be given for training 'labels'",
        ),
        "labels without classes": ({"labels": labels}, ValueError, "classes must be given with"),
        "gate without classes": (
            {"gate": "patience"}, ValueError,
            "classes must be given for a patience gate; agreement, static need none",
        ),
        "no such gate": (
            {"gate": "magic", "classes": texts}, ValueError, "gate must be one of learned, .*magic",
        ),
        "both goals": ({"budget": 0.5, "epsilon": 0.1}, ValueError, "budget or epsilon must be"),
        "budget above all": ({"budget": 1.5}, ValueError, r"budget must be in \(0, 1\), got 1.5"),
        "no exits": ({"num_exits": 0}, ValueError, "num_exits must be 1 to 5, got 0"),
        "many exits": ({"num_exits": 6}, ValueError, "num_exits must be 1 to 5, got 6"),
        "one exit of agreement": (
            {"num_exits": 1}, ValueError, "num_exits must be at least 2 for an agreement gate",
        ),
        "more exits than candidates": (
            {"num_exits": 4}, ValueError, "num_exits must be at most the 3 candidates, got 4",
        ),
        "delta": ({"epsilon": 0.1, "delta": 0}, ValueError, r"delta must be in \(0, 1\), got 0"),
        "integer classes": ({"classes": texts.int()}, TypeError, "classes must be a float tensor"),
        "classes of another space": (
            {"classes": torch.eye(5)}, ValueError, r"with E = 24, got \[5, 5\]",
        ),
        "a class of zeros": ({"classes": torch.zeros(5, E)}, ValueError, "no row zero"),
        "float labels": (
            {"classes": texts, "labels": labels.float()}, TypeError, "got torch.float32",
        ),
        "labels as a list": ({"classes": texts, "labels": [0] * N}, TypeError, "got list"),
        "labels as a column": (
            {"classes": texts, "labels": labels[:, None]}, ValueError, r"= \[200\], got \[200, 1\]",
        ),
        "fewer labels": (
            {"classes": texts, "labels": labels[1:]}, ValueError, r"\[n\] = \[200\], got \[199\]",
        ),
        "label too large": (
            {"classes": texts, "labels": labels + 5}, ValueError, "labels must be -1 to 4, got 5",
        ),
        "label too small": (
            {"classes": texts, "labels": labels - 2}, ValueError, "labels must be -1 to 4, got -2",
        ),
        "no known label": (
            {"classes": texts, "labels": labels - 1}, ValueError,
            "labels must be known in the gate split, got none",
        ),
        "budget out of reach": (
            {"budget": 0.3, "recipe": replace(QUICK, head=replace(head, steps=1))}, ValueError,
            "the agreement gate must reach the budget of 0.3, got no exits that do",
        ),
        "candidate at the end": (
            {"recipe": replace(QUICK, candidates=(3, 6))}, ValueError,
            "candidates must be 1 to 5, got 6",
        ),
        "noise drops all": (
            {"recipe": replace(QUICK, kappa=100.0)}, ValueError,
            r"candidates must be one at least, got none: .* noise drops \[3, 4, 5\]",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_arguments_that_do_not_fit(model: nn.Module, images: Tensor, case: str) -> None:
    options, error, message = refusals()[case]
    with pytest.raises(error, match=f"^calibrate: .*{message}") as caught:
        calibrated(model, images, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_images_that_do_not_fit(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="^calibrate: images must be at least 100, got 99"):
        calibrated(model, images[:99])
    with pytest.raises(ValueError, match="^calibrate: images must be one at least, got none"):
        calibrated(model, [])
    with pytest.raises(TypeError, match="^calibrate: images must be float .* got generator"):
        calibrated(model, (part for part in images.split(50)))
    with pytest.raises(TypeError, match="^calibrate: images must be float .* got ndarray"):
        calibrated(model, np.zeros((100, 3, 32, 32)))
    with pytest.raises(ValueError, match="^calibrate: images must be at least 32 x 32, got 32"):
        calibrated(model, images[..., :31])
    labels = torch.zeros(N - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must have shape \[n\] = \[200\], got \[199\]"):
        calibrated(model, [images], classes=torch.eye(5, E), labels=labels)


def test_the_teacher_is_the_model_that_was_accelerated(images: Tensor) -> None:
    quick: dict[str, Any] = {"recipe": QUICK, "is_timed": False, "progress": False}
    model = small_clip(seed=6)
    fast, other = lraee.accelerate(model), small_clip(seed=7)
    with pytest.raises(ValueError, match="^calibrate: teacher must be the model that was acceler"):
        lraee.calibrate(fast, images, teacher=other, **quick)
    expected = lraee.calibrate(fast, images, **quick)
    state = model.state_dict()
    del model
    gc.collect()
    message = "^calibrate: the float model was freed, .* give teacher="
    with pytest.raises(LookupError, match=message):
        lraee.calibrate(fast, images, **quick)
    other.load_state_dict(state)
    assert_same_exits(lraee.calibrate(fast, images, teacher=other, **quick), expected)
    alone = lraee.calibrate(fast, images, teacher=other.visual, **quick)
    assert_same_exits(alone, expected)
    lraee.accelerate(other, inplace=True)
    with pytest.raises(LookupError, match="^calibrate: the float model was freed"):
        lraee.calibrate(other, images, **quick)


def test_exits_of_another_tower_or_scheme(model: nn.Module, images: Tensor) -> None:
    exits = calibrated(model, images)
    with pytest.raises(ValueError, match="^accelerate: exits must be made for this tower's weight"):
        lraee.accelerate(small_clip(seed=8), exits=exits)
    with pytest.raises(ValueError, match="^accelerate: exits must be made for this scheme"):
        lraee.accelerate(model, scheme="paper", exits=exits)
    assert exits.base_hash == tower_hash(model.visual.state_dict())


def test_exits_made_when_int8_attention_had_to_be_named(model: nn.Module, images: Tensor) -> None:
    """Files from before attention="auto" say "int8", which is what a CPU computes either way."""
    exits = calibrated(model, images)
    assert exits.scheme.attention == "auto"
    older = replace(exits, scheme=lraee.Scheme(attention="int8"))
    fast = lraee.accelerate(model, exits=older)
    assert_same(
        fast.encode_image(images), lraee.accelerate(model, exits=exits).encode_image(images)
    )
    with pytest.raises(ValueError, match="^accelerate: exits must be made for this scheme"):
        lraee.accelerate(model, scheme=lraee.Scheme(attention="float"), exits=exits)


@pytest.mark.parametrize("vision", [{"pool_type": "none"}, {"output_tokens": True}])
def test_towers_that_can_have_no_exits(images: Tensor, vision: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="^exits: "):
        calibrated(small_clip(**vision), images)
