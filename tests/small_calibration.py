"""A calibration of seconds: a small random CLIP, smooth random pictures, short training."""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lraee.calibration.calibrate import calibrate
from lraee.calibration.head_training import HeadOptions
from lraee.calibration.pipeline import Recipe
from lraee.calibration.plans import Rules
from lraee.exits.bundle import Exits
from lraee.model.accelerate import accelerate
from tests.clip_models import make_images, make_model
from tests.support import assert_same, generator

N, E, LAYERS = 200, 24, 6
QUICK = Recipe(
    HeadOptions(kind="affine", steps=60, batch=64, learning_rate=1e-2, weight_decay=0.0),
    Rules(max_exits=2),
    candidates=(3, 4, 5),
)
QUICK_PAPER = replace(QUICK, head=replace(QUICK.head, training="both"))


def small_clip(seed: int = 0, **vision: Any) -> nn.Module:
    """A CLIP of six blocks; the random generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(vision={"layers": LAYERS, "width": 32, **vision}, embed_dim=E)


def pictures(n: int = N, seed: int = 1) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        contrast = torch.rand(n, 1, 1, 1) * 2 + 0.1
        return make_images(n) * contrast + torch.randn(n, 3, 1, 1)


@torch.no_grad()
def classes_of(model: nn.Module, images: Tensor, k: int = 5) -> Tensor:
    """Directions in which the embeddings of these images differ, so that answers do too."""
    embedding = model.encode_image(images)
    embedding = embedding - embedding.mean(0)
    picked = torch.randperm(len(images), generator=generator(3))[:k]
    return nn.functional.normalize(embedding[picked], dim=1)


def calibrated(model: nn.Module, images: Any, **options: Any) -> Exits:
    """lraee.calibrate of the accelerated model, quick and quiet."""
    options = {"recipe": QUICK, "is_timed": False, "progress": False} | options
    return calibrate(accelerate(model), images, teacher=model, **options)


def assert_same_exits(found: Exits, expected: Exits) -> None:
    """All but the time of day on the card."""
    assert found.plans == expected.plans and found.chosen == expected.chosen
    assert found.heads.keys() == expected.heads.keys()
    for block, head in expected.heads.items():
        for name, tensor in head.tensors().items():
            assert_same(found.heads[block].tensors()[name], tensor, block=block, name=name)
    assert (found.classes is None) == (expected.classes is None)
    if found.classes is not None and expected.classes is not None:
        assert_same(found.classes, expected.classes)
    for name in ("logit_scale", "compaction", "scheme", "base_hash"):
        assert getattr(found, name) == getattr(expected, name), name
    cards = [dict(exits.card) | {"made": ""} for exits in (found, expected)]
    assert json.loads(json.dumps(cards[0])) == json.loads(json.dumps(cards[1]))
