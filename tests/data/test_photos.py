import json
import logging
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lraee.data.classes import Classes, read_classes
from lraee.data.photos import Photos, decode
from lraee.data.sources import DataError, Limits
from lraee.towers.prompts import TEMPLATES, class_features
from tests.image_files import encoded, folder, photo, png_bomb
from tests.support import assert_same

CLASSES = Classes(("n01", "n02"), ("cat", "dog"))


def as_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def reasons(photos: Photos) -> dict[str, str]:
    return {row.name: row.reason for row in photos.skipped}


def read_all(photos: Photos) -> list[str]:
    batches = photos.batches(lambda image: pil_to_tensor(image), size=2, progress=False)
    return [name for batch in batches for name in batch.names]


# Good data


def test_folder_and_zip_give_the_same_photos(tmp_path: Path) -> None:
    root = folder(tmp_path / "train")
    members = {str(p.relative_to(tmp_path)): p.read_bytes() for p in root.rglob("*.jpg")}
    from_zip = Photos(as_zip(tmp_path / "train.zip", members), classes=CLASSES)
    from_folder = Photos(tmp_path / "train", classes=CLASSES)
    assert from_zip.names == [f"train/{name}" for name in from_folder.names]
    assert from_zip.labels == from_folder.labels == [0, 0, 0, 1, 1, 1]
    for i in range(6):
        assert_same(pil_to_tensor(from_zip.image(i)), pil_to_tensor(from_folder.image(i)))


def test_batches_hold_preprocessed_photos_in_order(tmp_path: Path) -> None:
    photos = Photos(folder(tmp_path / "p"), classes=CLASSES)
    batches = list(photos.batches(lambda image: pil_to_tensor(image), size=4, progress=False))
    assert [b.names for b in batches] == [photos.names[:4], photos.names[4:]]
    assert [b.labels for b in batches] == [[0, 0, 0, 1], [1, 1]]
    assert_same(batches[1].images[0], pil_to_tensor(photos.image(4)))


def test_png_is_decoded_exactly() -> None:
    assert_same(pil_to_tensor(decode(encoded(3, "PNG"))), pil_to_tensor(photo(3)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    image = Image.new("I;16", (8, 8), 256) if mode == "I;16" else photo(1).convert(mode)
    image.save(path)
    assert decode(path.read_bytes()).mode == "RGB"


def test_labels_come_from_the_innermost_known_folder(tmp_path: Path) -> None:
    names = ["n02/n01/images/a.jpg", "other/b.jpg", "n02.jpg"]
    path = as_zip(tmp_path / "x.zip", {name: encoded(1) for name in names})
    photos = Photos(path, classes=CLASSES)
    assert dict(zip(photos.names, photos.labels, strict=True)) == {
        "n02/n01/images/a.jpg": 0,
        "other/b.jpg": None,
        "n02.jpg": None,
    }
    assert Photos(path).labels == [None, None, None]


def test_limit_spreads_over_the_classes(tmp_path: Path) -> None:
    photos = Photos(folder(tmp_path / "p", count=10), classes=CLASSES, limit=4)
    assert photos.labels == [0, 0, 1, 1]
    assert len(Photos(tmp_path / "p", limit=99)) == 20
    with pytest.raises(DataError, match="limit must be at least 1, got 0"):
        Photos(tmp_path / "p", limit=0)


def test_only_looks_at_the_named_files_alone(tmp_path: Path) -> None:
    root = folder(tmp_path / "p")
    (root / "note.txt").write_text("x")
    photos = Photos(root, only=("n01/1.jpg",))
    assert photos.names == ["n01/1.jpg"] and photos.skipped == []


# Hostile files

BAD = {
    "cut.jpg": (encoded(1)[:300], "is not a whole image"),
    "cut.png": (encoded(1, "PNG")[:-200], "is not a whole image"),
    "empty.jpg": (b"", "is not a whole image"),
    "text.jpg": (b"hello" * 100, "is not a whole image"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a whole image"),
    "bomb.png": (png_bomb(60_000, 60_000), "60000 x 60000 pixels"),
    "many.png": (png_bomb(14_000, 13_000), "14000 x 13000 pixels, more than 178956970"),
    "thin.png": (png_bomb(40_000, 2), "longer than 50 : 1"),
    "notes.txt": (b"boxes", "has no photo's suffix"),
    ".hidden.jpg": (encoded(1), "is a hidden file"),
}


@pytest.mark.parametrize("as_archive", [False, True])
def test_bad_files_are_skipped_and_reported(
    tmp_path: Path, as_archive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    members = {name: data for name, (data, _) in BAD.items()} | {"good.jpg": encoded(1)}
    if as_archive:
        path = as_zip(tmp_path / "x.zip", members)
    else:
        path = tmp_path
        for name, data in members.items():
            (path / name).write_bytes(data)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "lraee"):
        warnings.simplefilter("error")
        photos = Photos(path)
        assert read_all(photos) == ["good.jpg"]
    result = reasons(photos)
    assert result.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in result[name], (name, result[name])
    assert photos.report().startswith(f"skipped {len(BAD)} files: ")
    assert "skipped 8 files" in caplog.text  # the two refused by name are known before


def test_mutated_photos_decode_or_are_refused() -> None:
    rng = random.Random(0)
    refused = 0
    for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        whole = encoded(5, form, (24, 20))
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert decode(bytes(data)).mode == "RGB"
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    huge = tmp_path / "p" / "huge.jpg"
    huge.parent.mkdir()
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take a terabyte
    photos = Photos(tmp_path / "p")
    assert read_all(photos) == []
    assert reasons(photos)["huge.jpg"] == f"has {1 << 40} bytes, more than {64 << 20}"


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    limits = Limits(file_size_bytes=1 << 16, total_size_bytes=1 << 18)
    one = as_zip(tmp_path / "one.zip", {"a.jpg": bytes(1 << 17), "b.jpg": encoded(1)})
    photos = Photos(one, limits=limits)
    assert read_all(photos) == ["b.jpg"]
    assert reasons(photos) == {"a.jpg": f"has {1 << 17} bytes, more than {1 << 16}"}
    many = as_zip(tmp_path / "many.zip", {f"{i}.jpg": bytes(1 << 16) for i in range(5)})
    with pytest.raises(DataError, match="must unpack to at most 262144 bytes, got 327680"):
        Photos(many, limits=limits)
    with pytest.raises(DataError, match="must hold at most 3 files"):
        Photos(many, limits=Limits(count=3))


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {"a.jpg": bytes(1 << 17)})
    data = path.read_bytes()
    honest, small = (1 << 17).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(data.replace(honest, small))
    photos = Photos(path, limits=Limits(file_size_bytes=1000))
    assert read_all(photos) == []
    assert "cannot be read" in reasons(photos)["a.jpg"]


def test_odd_member_names_are_refused(tmp_path: Path) -> None:
    odd = ["../up.jpg", "/root.jpg", "a/../../b.jpg", "back\\slash.jpg", "bell\x07.jpg"]
    path = as_zip(
        tmp_path / "x.zip", dict.fromkeys([*odd, "__MACOSX/._a.jpg", "a.jpg"], encoded(1))
    )
    photos = Photos(path)
    assert photos.names == ["a.jpg"]
    assert list(reasons(photos).values()) == ["has an unsafe name"] * 5 + ["is a hidden file"]
    assert all(name.isascii() and name.isprintable() for name in reasons(photos))


def test_repeated_and_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the repeated name
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a.jpg", "a.jpg", "locked.jpg"):
                archive.writestr(name, encoded(1))
            archive.infolist()[-1].flag_bits |= 1
    photos = Photos(path)
    assert photos.names == ["a.jpg"]
    assert reasons(photos) == {"a.jpg": "is there twice", "locked.jpg": "is encrypted"}


def test_a_fifo_named_like_a_photo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    photos = Photos(tmp_path)
    assert read_all(photos) == []
    result = reasons(photos)
    assert result["pipe.jpg"] == "is not a regular file"
    assert result["loop.jpg"].startswith("cannot be read: ")


def test_mutated_archives_raise_one_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = as_zip(tmp_path / "x.zip", {f"n01/{i}.jpg": encoded(i) for i in range(2)}).read_bytes()
    path = tmp_path / "y.zip"
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            # The directory at the end is what zipfile parses first
            data[-rng.randint(1, 160)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_all(Photos(path))
        except DataError as error:
            assert "\n" not in str(error)


def test_no_photo_at_all_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a folder or a ZIP file, got no such thing"):
        Photos(tmp_path / "missing")
    with pytest.raises(DataError, match=r"must hold photos, got none \(nothing skipped\)"):
        Photos(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"got none \(skipped 1 file: a.txt has no photo's suffix\)"
    ):
        Photos(tmp_path)
    with pytest.raises(DataError, match="must be a ZIP file: File is not a zip file"):
        Photos(tmp_path / "a.txt")


# Class names


def test_read_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"wnids": ["n01", "n02"], "names": ["cat", "dog"], "more": 1}))
    assert read_classes(path) == CLASSES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON: "),
        ("\xff", "must be JSON: "),
        ("[" * 100_000, "must be a readable JSON: "),
        ("[1]", 'must have the keys "wnids" and "names", got list'),
        ('{"wnids": ["a"]}', 'must have the keys "wnids" and "names", got wnids'),
        ('{"wnids": "a", "names": ["b"]}', 'must have a list of words under "wnids"'),
        ('{"wnids": [], "names": []}', 'must have a list of words under "wnids"'),
        ('{"wnids": ["a"], "names": [1]}', 'must have a list of words under "names"'),
        ('{"wnids": ["a"], "names": [" "]}', 'must have a list of words under "names"'),
        ('{"wnids": ["a"], "names": ["b", "c"]}', "got 1 wnids, 2 names"),
        ('{"wnids": ["a", "a"], "names": ["b", "c"]}', "must not repeat a wnid"),
    ],
)
def test_bad_classes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_classes(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_classes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a readable JSON"):
        read_classes(tmp_path / "missing.json")


class _Letters(torch.nn.Module):
    """Text tower of one weight: the embedding of a text is its first two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert normalize
        return torch.nn.functional.normalize(text.float(), dim=-1)


def test_class_features_are_the_mean_direction_of_the_prompts() -> None:
    tokens = {"a x": [3.0, 4.0], "b x": [0.0, 2.0], "a y": [1.0, 0.0], "b y": [1.0, 0.0]}
    rows = class_features(
        _Letters(),
        lambda texts: torch.tensor([tokens[text] for text in texts]),
        ["x", "y"],
        templates=(lambda c: f"a {c}", lambda c: f"b {c}"),
        batch=1,
        progress=False,
    )
    # x: mean of (0.6, 0.8) and (0, 1) is (0.3, 0.9), of length sqrt(0.9)
    expected = torch.tensor([[0.3 / 0.9**0.5, 0.9 / 0.9**0.5], [1.0, 0.0]])
    torch.testing.assert_close(rows, expected, rtol=0, atol=4 * 2.0**-24)


def test_templates_are_a_tenth_of_clips_eighty() -> None:
    assert [template("cat") for template in TEMPLATES][:2] == [
        "a bad photo of a cat.",
        "the embroidered cat.",
    ]
    assert len(TEMPLATES) == 8
