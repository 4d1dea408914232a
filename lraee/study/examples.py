"""Photos that exits rescue or lose, with the answer of each exit."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lraee.data.photos import Photos
from lraee.study.schema import Answer, Example

_SIDE, _QUALITY = 128, 85


@dataclass(frozen=True)
class Answers:
    """Answers of exits and full depth to n photos, and where each photo exited.

    Args:
      blocks: depths of the m exits and last that of the whole tower: m + 1.
      top1: int64 [n, m], the exits' answers.
      confidence: float [n, m], their probabilities in [0, 1]; NaN where there was no probe.
      full_top1: int64 [n], the answer at full depth.
      full_probability: float [n], its probability.
      taken: int64 [n], index of the exit where a photo exited; m at full depth.
    Raises: ValueError on shapes that do not fit and on a `taken` that is no exit.
    """

    blocks: Sequence[int]
    top1: Tensor
    confidence: Tensor
    full_top1: Tensor
    full_probability: Tensor
    taken: Tensor

    def __post_init__(self) -> None:
        """See the class."""
        n, m = len(self.full_top1), len(self.blocks) - 1
        for name, shape in (
            ("top1", [n, m]), ("confidence", [n, m]), ("full_probability", [n]), ("taken", [n]),
        ):  # fmt: skip
            sizes = list(getattr(self, name).shape)
            if sizes != shape:
                raise ValueError(f"examples: {name} must be {shape}, got {sizes}")
        if n and not 0 <= int(self.taken.min()) <= int(self.taken.max()) <= m:
            got = f"{int(self.taken.min())} to {int(self.taken.max())}"
            raise ValueError(f"examples: taken must be in 0 to {m}, got {got}")

    @property
    def answers(self) -> Tensor:
        """Int64 [n, m + 1], full depth last."""
        return torch.cat([self.top1, self.full_top1[:, None]], dim=1)

    @property
    def probabilities(self) -> Tensor:
        """Float [n, m + 1]."""
        return torch.cat([self.confidence, self.full_probability[:, None]], dim=1)


def examples(
    photos: Photos,
    names: Sequence[str],
    given: Answers,
    *,
    labels: Tensor,
    class_names: Sequence[str],
    backbone: str,
    most: int = 12,
) -> list[Example]:
    """Up to `most` rescued photos and then as many lost ones, as `kind` "rescued" and "lost".

    Each class gives its first photo before any gives its second; among these, those come first of
    which full depth is surest. A photo is its centre square, 128 px, as JPEG of quality 85.
    Probabilities are in [0, 1]; an exit without a probe gives no answer.

    Args:
      photos: where the photos are.
      names: n names in `photos`, in the order of the rows of `given`.
      given: see Answers.
      labels: int64 [n], indices of class_names.
      class_names: K words.
      backbone: name of schema.
      most: of each kind.
    Raises: ValueError on shapes that do not fit, DataError on a photo that cannot be read.
    """
    if not len(names) == len(labels) == len(given.full_top1):
        raise ValueError(
            f"examples: names and labels must be {len(given.full_top1)} as the answers are, got"
            f" {len(names)} and {len(labels)}"
        )
    right = given.answers == labels[:, None]
    right_with, right_full = right.gather(1, given.taken[:, None])[:, 0], right[:, -1]
    kinds = {"rescued": right_with & ~right_full, "lost": ~right_with & right_full}
    rows = [
        (kind, row)
        for kind, marks in kinds.items()
        for row in chosen(marks, given.full_probability, labels)[:most]
    ]
    shown = photos.only([names[row] for _, row in rows])
    places = {name: place for place, name in enumerate(shown.names)}
    missing = [names[row] for _, row in rows if names[row] not in places]
    if missing:
        raise ValueError(f"examples: names must be photos of the source, got {missing[0]!r}")
    return [
        {
            "kind": kind,
            "backbone": backbone,
            "label": class_names[int(labels[row])],
            "jpeg": jpeg(shown.image(places[names[row]])),
            "answers": _answers(given, row, class_names),
        }
        for kind, row in rows
    ]


def chosen(marks: Tensor, probability: Tensor, labels: Tensor) -> list[int]:
    """The marked rows: the first of each class, then the second, and so on; surest first.

    Args:
      marks: bool [n].
      probability: float [n].
      labels: int64 [n].
    """
    rows = torch.nonzero(marks)[:, 0].tolist()
    rows.sort(key=lambda row: -float(probability[row]))
    counts: Counter[int] = Counter()
    rounds = {}
    for row in rows:
        label = int(labels[row])
        rounds[row] = counts[label]
        counts[label] += 1
    return sorted(rows, key=lambda row: rounds[row])  # stable: surest first within a round


def jpeg(image: Image.Image) -> str:
    """The centre square of an RGB image, 128 px, as base64 of a JPEG."""
    buffer = BytesIO()
    square = ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.BICUBIC)
    square.save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _answers(given: Answers, row: int, class_names: Sequence[str]) -> list[Answer]:
    table = zip(
        given.blocks, given.answers[row].tolist(), given.probabilities[row].tolist(), strict=True
    )
    return [
        {
            "block": block,
            "name": class_names[answer],
            "probability": probability,
            "is_taken": place == int(given.taken[row]),
        }
        for place, (block, answer, probability) in enumerate(table)
        if probability == probability  # NaN: no probe
    ]
