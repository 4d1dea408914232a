"""From what a user names, a model and labelled photos, to a report."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lraee.calibration.pipeline import digest
from lraee.data.batches import PhotoImages
from lraee.data.classes import Classes
from lraee.data.photos import Photos
from lraee.data.sources import DataError
from lraee.model.set_classes import unit_classes
from lraee.storage.stages import Stages
from lraee.study.backbones import Model
from lraee.study.protocol import Protocol
from lraee.study.schema import Report
from lraee.study.study import Pictures, Study
from lraee.towers.prompts import class_features, templates
from lraee.towers.state import tower_hash
from lraee.zoo.opening import Opened

_HELD_OUT = 5
MIN_PHOTOS = 100


@dataclass(frozen=True)
class Sides:
    """Photos to learn from, and photos to report on."""

    learn: Photos
    report: Photos


def sides(
    learn: Path,
    report: Path | None,
    classes: Classes,
    *,
    limit: int | None,
    report_limit: int | None = None,
) -> Sides:
    """The two sides; without photos to report on, every fifth labelled photo of each class.

    Args:
      learn: folder or ZIP of photos.
      report: another one, or None.
      classes: their labels.
      limit: at most so many photos of each folder or ZIP.
      report_limit: another limit of `report`.
    Raises: DataError on photos without labels and on too few.
    """
    photos = _labelled(Photos(learn, classes=classes, limit=limit), learn)
    if report is not None:
        others = Photos(report, classes=classes, limit=report_limit or limit)
        return Sides(photos, _labelled(others, report))
    count: dict[int | None, int] = {}
    held_out: list[str] = []
    for name, label in zip(photos.names, photos.labels, strict=True):
        count[label] = count.get(label, 0) + 1
        if count[label] % _HELD_OUT == 0:
            held_out.append(name)
    if not held_out:
        raise DataError(
            f"data: {learn} must hold {_HELD_OUT} photos of a class at least, got"
            f" {max(count.values())} of the largest; give photos to report on"
        )
    kept = set(photos.names) - set(held_out)
    return Sides(photos.only(kept), photos.only(held_out))


def _labelled(photos: Photos, path: Path) -> Photos:
    names = [
        name for name, label in zip(photos.names, photos.labels, strict=True) if label is not None
    ]
    if len(names) < MIN_PHOTOS:
        raise DataError(
            f"data: {path} must hold at least {MIN_PHOTOS} photos in folders named by a wnid of the"
            f" classes, got {len(names)}"
        )
    return photos.only(names)


def study(
    opened: Opened,
    classes: Classes,
    both_sides: Sides,
    *,
    work: Path,
    protocol: Protocol,
    prompts: int,
    progress: bool,
) -> Report:
    """The report of a model on these photos; a run cut off goes on in `work`.

    Args:
      opened: the model.
      classes: names for its prompts, in the order of the photos' labels.
      both_sides: the photos.
      work: folder for finished stages.
      protocol: how the study is run.
      prompts: templates per class.
      progress: show bars.
    Raises: what lraee.accelerate and Photos raise; ValueError on a folder that is not of a run.
    """
    ready = prepared(opened, classes, both_sides, prompts=prompts, progress=progress)
    return Study(
        ready.model, ready.learn, ready.report, protocol=protocol,
        stages=Stages(work, ready.settings), progress=progress,
    ).run()  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A model with its classes and decoded photos; `settings` say what they are, as JSON."""

    model: Model
    learn: Pictures
    report: Pictures
    settings: dict[str, object]


def prepared(
    opened: Opened, classes: Classes, both_sides: Sides, *, prompts: int, progress: bool
) -> Prepared:
    """Class texts encoded and all photos decoded; see study."""
    texts = class_features(
        opened.model, opened.tokenizer, classes.names, templates=templates(prompts),
        progress=progress,
    )  # fmt: skip
    model = Model(
        title=opened.title,
        clip=opened.model,
        classes=unit_classes("report", texts, texts.shape[1]),
        class_names=classes.names,
        templates=prompts,
    )
    learn, report = (
        Pictures(photos, PhotoImages(photos, opened.with_margin, progress=progress))
        for photos in (both_sides.learn, both_sides.report)
    )
    settings: dict[str, object] = {
        "base": tower_hash(model.tower.state_dict()),
        "classes": digest(model.classes),
        "learn": _names_hash(learn),
        "report": _names_hash(report),
    }
    return Prepared(model, learn, report, settings)


def _names_hash(pictures: Pictures) -> str:
    """Of the photos that could be read, their labels and the first batch's pixels."""
    names = "\n".join(pictures.images.names)
    first = next(iter(pictures.images))
    parts = (names, digest(pictures.images.labels), digest(first))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
