"""Which photos are shown, what is said of them, and that they are the photos of these names."""

import base64
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lraee.data.photos import DataError, Photos
from lraee.study.examples import Answers, chosen, examples, jpeg

NAMES = ("ant", "bee", "cat")
# Photos 0 to 5; exits after blocks 8 and 10 of 12
TRUTH = torch.tensor([0, 0, 1, 2, 1, 0])
TOP1 = torch.tensor([[0, 1], [0, 0], [0, 1], [0, 2], [1, 1], [0, 0]])
FULL = torch.tensor([1, 1, 2, 2, 1, 2])
TAKEN = torch.tensor([0, 1, 1, 0, 2, 2])
"""Photos 0, 1, 2 are rescued, 3 is lost, 4 right both ways, 5 wrong both ways."""


def said(**changes: Any) -> Answers:
    arguments: dict[str, Any] = {
        "blocks": (8, 10, 12),
        "top1": TOP1,
        "confidence": torch.tensor([[0.5, 0.6]]).expand(6, 2).clone(),
        "full_top1": FULL,
        "full_probability": torch.tensor([0.3, 0.9, 0.5, 0.7, 0.8, 0.2]),
        "taken": TAKEN,
    }
    return Answers(**(arguments | changes))


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Photo i is a plane of one shade, 10 + 40 i, named so that order of names is not of rows."""
    for i in range(6):
        Image.new("RGB", (64, 48), (10 + 40 * i,) * 3).save(tmp_path / f"{9 - i}.png")
    return Photos(tmp_path)


ROWS = [f"{9 - i}.png" for i in range(6)]


def made(photos: Photos, **changes: Any) -> list[Any]:
    arguments = {"labels": TRUTH, "class_names": NAMES, "backbone": "int8"} | changes
    return list(examples(photos, ROWS, said(), **arguments))


def shade(text: str) -> int:
    image = Image.open(BytesIO(base64.b64decode(text)))
    assert (image.format, image.size) == ("JPEG", (128, 128))
    return int(image.getpixel((64, 64))[0])  # type: ignore[index]


def test_each_photo_comes_with_its_label_and_picture(photos: Photos) -> None:
    result = made(photos)
    assert [(each["kind"], each["label"]) for each in result] == [
        ("rescued", "ant"), ("rescued", "bee"), ("rescued", "ant"), ("lost", "cat"),
    ]  # fmt: skip
    for each, row in zip(result, (1, 2, 0, 3), strict=True):
        assert abs(shade(each["jpeg"]) - (10 + 40 * row)) <= 2
        assert each["backbone"] == "int8"


def test_answers_are_those_of_the_exits(photos: Photos) -> None:
    answers = made(photos)[0]["answers"]
    assert [(a["block"], a["name"], a["is_taken"]) for a in answers] == [
        (8, "ant", False), (10, "ant", True), (12, "bee", False),
    ]  # fmt: skip
    assert [a["probability"] for a in answers] == pytest.approx([0.5, 0.6, 0.9])


def test_most_is_of_each_kind(photos: Photos) -> None:
    assert [each["label"] for each in made(photos, most=1)] == ["ant", "cat"]
    assert made(photos, most=0) == []


def test_an_exit_without_a_probe_says_nothing(photos: Photos) -> None:
    confidence = torch.full((6, 2), math.nan)
    confidence[:, 0] = 0.4
    confidence[1, 1] = 0.4
    result = examples(
        photos, ROWS, said(confidence=confidence), labels=TRUTH, class_names=NAMES, backbone="int8"
    )
    assert [[a["block"] for a in each["answers"]] for each in result] == [
        [8, 10, 12], [8, 12], [8, 12], [8, 12],
    ]  # fmt: skip


def test_classes_take_turns_surest_first() -> None:
    marks = torch.tensor([True, True, True, False, True, True])
    probability = torch.tensor([0.1, 0.9, 0.8, 1.0, 0.7, 0.2])
    labels = torch.tensor([5, 7, 7, 5, 7, 5])
    # Round one: 1 (class 7), 5 (class 5); two: 2, 0; three: 4
    assert chosen(marks, probability, labels) == [1, 5, 2, 0, 4]


def test_a_photo_is_its_centre_square() -> None:
    wide = Image.new("RGB", (300, 100), (200, 0, 0))
    wide.paste((0, 0, 200), (100, 0, 200, 100))
    image = Image.open(BytesIO(base64.b64decode(jpeg(wide)))).convert("RGB")
    assert all(image.getpixel((x, 64))[2] > 150 for x in (4, 64, 123))  # type: ignore[index]


def test_a_photo_that_cannot_be_read_is_named(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / ROWS[1]).write_bytes(b"no photo")
    with pytest.raises(DataError, match="not a whole image"):
        made(photos)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top1": TOP1[:, :1]}, r"top1 must be \[6, 2\], got \[6, 1\]"),
        ({"taken": TAKEN[:2]}, r"taken must be \[6\], got \[2\]"),
        ({"taken": TAKEN + 1}, "taken must be in 0 to 2"),
    ],
)
def test_shapes_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        said(**changes)


def test_names_and_labels_must_be_those_of_the_answers(photos: Photos) -> None:
    with pytest.raises(ValueError, match="names and labels must be 6"):
        made(photos, labels=TRUTH[:3])
    with pytest.raises(ValueError, match="names must be photos of the source, got '8.png'"):
        made(photos.only(ROWS[:1]))
