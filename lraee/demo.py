"""A real CLIP on real photos: float against int8, and what each photo is taken for."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lraee import evaluate, machine
from lraee.accelerate import accelerate
from lraee.classes import class_features
from lraee.data import Photos
from lraee.models import Opened
from lraee.sources import DataError

SCHEMA = "lraee.demo/1"
INT8 = "int8"
# Photographs in scikit-image's wheel; its other files are drawings, microscopy and test patterns.
SAMPLES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)


@dataclass(frozen=True)
class Answer:
    """What one photo is taken for, with the share that softmax gives it, by each model."""

    photo: str
    float_name: str
    float_share: float
    int8_name: str
    int8_share: float


def sample_photos() -> Photos:
    """Return the photographs that scikit-image ships; raises DataError where it is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "demo: photos must come from --data FOLDER, or from scikit-image, which is not "
            "installed: pip install 'lraee[demo]'"
        )
    return Photos(Path(spec.submodule_search_locations[0]) / "data", only=SAMPLES)


def open_photos(data: str | os.PathLike[str] | None, limit: int) -> Photos:
    """Return the photos of a folder or ZIP, or the sample photos."""
    return sample_photos() if data is None else Photos(data, limit=limit)


def run(
    opened: Opened, photos: Photos, *, names: Sequence[str] | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run both models on every photo, one at a time; return the rows, answers and machine.

    Args:
      opened: model, preprocessing and tokenizer.
      photos: what to look at.
      names: what a photo may be taken for; by default the words that the model was made to know.
      progress: show bars.
    """
    names = names or opened.class_names
    models = {evaluate.FLOAT: opened.model, INT8: accelerate(opened.model)}
    embedded = evaluate.embed(models, photos, opened.preprocess, batch=1, progress=progress)
    class_rows = class_features(opened.model, opened.tokenizer, names, progress=progress).cpu()
    rows = evaluate.compare(embedded, models, class_rows)
    scale = opened.model.get_parameter("logit_scale").exp().item()
    answers = _answers(embedded, class_rows, scale, names)
    return {
        "schema": SCHEMA,
        **machine.describe(),
        "model": opened.title,
        "classes": len(names),
        "photos": len(embedded.names),
        "skipped": len(photos.skipped),
        "skipped_first": [asdict(row) for row in photos.skipped[:10]],
        "rows": [asdict(row) for row in rows],
        "answers": [asdict(answer) for answer in answers],
    }


def _answers(
    embedded: evaluate.Embedded, class_rows: Tensor, scale: float, names: Sequence[str]
) -> list[Answer]:
    best = {}
    for form in (evaluate.FLOAT, INT8):
        logits = scale * embedded.embeddings[form] @ class_rows.T
        best[form] = torch.softmax(logits, dim=1).max(dim=1)
    answers = []
    for i, photo in enumerate(embedded.names):
        (p, k), (p8, k8) = ((best[f].values[i], best[f].indices[i]) for f in best)
        answers.append(Answer(photo, names[int(k)], float(p), names[int(k8)], float(p8)))
    return answers
