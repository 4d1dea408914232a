"""A backbone of seconds: a small random CLIP and smooth random pictures with labels."""

from functools import cache

import torch
from torch import Tensor

from lraee.calibration.collect import Pair
from lraee.model.set_classes import unit_classes
from lraee.storage.stages import Stages
from lraee.study.backbones import Model, backbone
from lraee.study.cached_features import CachedFeatures
from lraee.study.trials import Backbone
from tests.small_calibration import classes_of, pictures, small_clip

CLASSES = 5
SPLITS = {"heads": 0.5, "gate": 0.25, "thresholds": 0.25}


@cache
def small_model() -> Model:
    clip = small_clip()
    classes = unit_classes("report", classes_of(clip, pictures(), CLASSES), 24)
    return Model("small", clip, classes, tuple("abcde"), 1)


def labels_of(model: Model, images: Tensor) -> Tensor:
    """The float model's answers, every fifth one replaced by the next class."""
    with torch.no_grad():
        labels = (model.clip.encode_image(images, normalize=True) @ model.classes.T).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return labels


@cache
def small_form(name: str) -> Backbone:
    """A backbone with 200 pictures to learn from and 120 to report on."""
    model, stages = small_model(), Stages(None, None)
    sides = {"learn": pictures(200), "report": pictures(120, seed=7)}
    fast = backbone(model.clip, name)
    pairs = {
        side: CachedFeatures(
            Pair(model.clip, fast, images, batch=64, progress=False),
            name=f"{name} {side}", teacher_name=f"teacher {side}", stages=stages,
        )
        for side, images in sides.items()
    }  # fmt: skip
    labels = {side: labels_of(model, images) for side, images in sides.items()}
    return Backbone(
        name, model, pairs["learn"], pairs["report"], labels["learn"], labels["report"], stages,
        SPLITS,
    )  # fmt: skip
