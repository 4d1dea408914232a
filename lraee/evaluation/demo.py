"""A real CLIP on real photos: float, int8 and early exits, and what each photo is taken for."""

import importlib.util
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lraee.calibration.calibrate import calibrate
from lraee.calibration.pipeline import BEST
from lraee.data.names import reason_counts
from lraee.data.photos import Photos
from lraee.data.sources import DataError, Skipped
from lraee.evaluation import evaluate
from lraee.exits.bundle import Exits
from lraee.measurement import machine
from lraee.model.accelerate import accelerate
from lraee.towers.prompts import class_features
from lraee.zoo.opening import Opened

SCHEMA = "lraee.demo/2"
INT8, EXITS = "int8", "exits"
CROPS = 1040
RECIPE = replace(BEST, head=replace(BEST.head, steps=300, views=0))
"""Crops are views already, and few: a longer training would only learn them by heart."""
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
    """What one photo is taken for, with the share that softmax gives it, by each model.

    `exit_block`: after how many blocks it left the tower with exits.
    """

    photo: str
    float_name: str
    float_share: float
    int8_name: str
    int8_share: float
    exits_name: str
    exits_share: float
    exit_block: int


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


def random_crops(opened: Opened, photos: Photos, count: int) -> Tensor:
    """Crops float32 [>= count, 3, H, W] of the photos, evenly many of each, seeded.

    A crop holds 10 to 100 % of its photo, so that a few photos give many different pictures.
    """
    source = random.Random(0)
    each, crops = -(-count // len(photos)), []
    bad: list[Skipped] = []
    for i in range(len(photos)):
        try:
            photo = photos.image(i)
        except DataError as error:  # reported when the photos are embedded, if there are any
            bad.append(Skipped(photos.names[i], str(error)))
            continue
        for _ in range(each):
            side = max(1, round(min(photo.size) * source.uniform(0.32, 1.0)))
            x = source.randint(0, photo.width - side)
            y = source.randint(0, photo.height - side)
            crops.append(opened.with_margin(photo.crop((x, y, x + side, y + side))))
    if not crops:
        photos.skipped += bad
        raise DataError(
            f"data: photos must hold one that can be read, got none ({photos.report()})"
        )
    return torch.stack(crops)


def learn_exits(
    opened: Opened, fast: nn.Module, photos: Photos, class_rows: Tensor, *, progress: bool = True
) -> Exits:
    """Early exits from crops of the photos: enough to see them work, not to serve with."""
    crops = random_crops(opened, photos, CROPS)
    return calibrate(fast, crops, classes=class_rows, recipe=RECIPE, progress=progress)


def run(
    opened: Opened, photos: Photos, *, names: Sequence[str] | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run all forms on every photo, one at a time; return the rows, answers and machine.

    Args:
      opened: model, preprocessing and tokenizer.
      photos: what to look at.
      names: what a photo may be taken for; by default the words that the model was made to know.
      progress: show bars.
    """
    names = names or opened.class_names
    class_rows = class_features(opened.model, opened.tokenizer, names, progress=progress).cpu()
    fast = accelerate(opened.model)
    exits = learn_exits(opened, fast, photos, class_rows, progress=progress)
    models = {
        evaluate.FLOAT: opened.model,
        INT8: fast,
        EXITS: accelerate(opened.model, exits=exits),
    }
    embedded = evaluate.embed(models, photos, opened.preprocess, batch=1, progress=progress)
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
        "skipped_reasons": reason_counts(row.reason for row in photos.skipped),
        "skipped_first": [asdict(row) for row in photos.skipped[:10]],
        "crops": sum(exits.card["images"].values()),
        "plan": exits.card["plans"][exits.chosen],
        "rows": [asdict(row) for row in rows],
        "answers": [asdict(answer) for answer in answers],
    }


def _answers(
    embedded: evaluate.Embedded, class_rows: Tensor, scale: float, names: Sequence[str]
) -> list[Answer]:
    best = {}
    for form in (evaluate.FLOAT, INT8, EXITS):
        logits = scale * embedded.embeddings[form] @ class_rows.T
        best[form] = torch.softmax(logits, dim=1).max(dim=1)
    answers = []
    for i, photo in enumerate(embedded.names):
        name = {form: names[int(top.indices[i])] for form, top in best.items()}
        share = {form: float(top.values[i]) for form, top in best.items()}
        answers.append(
            Answer(
                photo,
                float_name=name[evaluate.FLOAT],
                float_share=share[evaluate.FLOAT],
                int8_name=name[INT8],
                int8_share=share[INT8],
                exits_name=name[EXITS],
                exits_share=share[EXITS],
                exit_block=embedded.exit_blocks[EXITS][i],
            )
        )
    return answers
