"""Photos as batches: the same in every pass, from memory and decoded again, bad files left out."""

from pathlib import Path

import pytest
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lraee.data import batches as photo_images
from lraee.data.batches import PhotoImages
from lraee.data.classes import Classes
from lraee.data.photos import Photos
from tests.image_files import encoded, folder, photo
from tests.support import assert_same

CLASSES = Classes(("n02", "n01"), ("teapot", "goldfish"))


class Preprocess:
    """Pixels as floats; counts how many photos it saw."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Image) -> Tensor:
        self.calls += 1
        return pil_to_tensor(image).float() / 255


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Three photos of each of two classes, one of none, and a file that is no photo among them."""
    root = folder(tmp_path / "photos")
    (root / "n01" / "1 broken.jpg").write_bytes(b"nothing")
    (root / "n02" / "9 cut off.png").write_bytes(encoded(5, "PNG")[:-40])
    (root / "other").mkdir()
    (root / "other" / "a.jpg").write_bytes(encoded(300))
    return Photos(root, classes=CLASSES)


NAMES = [
    "n01/0.jpg",
    "n01/1.jpg",
    "n01/2.jpg",
    "n02/0.jpg",
    "n02/1.jpg",
    "n02/2.jpg",
    "other/a.jpg",
]


@pytest.mark.parametrize("limit_bytes", [1 << 30, 0, 3 * 80 * 64 * 4 * 3])
def test_every_pass_is_the_same(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    """All in memory, none, and memory that is full after the first batch of three."""
    monkeypatch.setattr(photo_images, "_KEPT_BYTES", limit_bytes)
    preprocess = Preprocess()
    images = PhotoImages(photos, preprocess, batch=3, progress=False)
    assert preprocess.calls == 7 and len(images) == 3
    assert images.names == NAMES
    assert images.labels.tolist() == [1, 1, 1, 0, 0, 0, -1] and images.labels.dtype == torch.int64
    expected = [pil_to_tensor(photo(seed)) for seed in (0, 1, 2, 100, 101, 102, 300)]
    passes = [list(images), list(images)]
    for batches in passes:
        assert [len(batch) for batch in batches] == [3, 3, 1]
        for result, original in zip(torch.cat(batches), expected, strict=True):
            # JPEG: the same picture, not the same pixels
            assert (result * 255 - original.float()).abs().mean() < 12
    assert_same(torch.cat(passes[0]), torch.cat(passes[1]))
    assert preprocess.calls == (7 if limit_bytes == 1 << 30 else 21)


def test_decoded_again_is_what_was_kept(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list(PhotoImages(photos, Preprocess(), batch=2, progress=False))
    monkeypatch.setattr(photo_images, "_KEPT_BYTES", 0)
    decoded = list(PhotoImages(photos, Preprocess(), batch=2, progress=False))
    for result, expected in zip(decoded, kept, strict=True):
        assert_same(result, expected)


def test_bad_files_are_skipped_and_reported_once(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(photo_images, "_KEPT_BYTES", 0)
    images = PhotoImages(photos, Preprocess(), batch=4, progress=False)
    for _ in range(2):
        list(images)
    assert [row.name for row in photos.skipped] == ["n01/1 broken.jpg", "n02/9 cut off.png"]
    assert sum("data: skipped" in record.message for record in caplog.records) == 1


def test_a_limit_and_a_file_that_is_gone(
    photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read again is what was read first; a file that vanished shortens the pass."""
    monkeypatch.setattr(photo_images, "_KEPT_BYTES", 0)
    some = Photos(tmp_path / "photos", classes=CLASSES, limit=4)
    images = PhotoImages(some, Preprocess(), batch=4, progress=False)
    assert len(images.names) == len(torch.cat(list(images))) < 5
    (tmp_path / "photos" / images.names[0]).unlink()
    assert len(torch.cat(list(images))) == len(images.names) - 1


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    images = PhotoImages(Photos(tmp_path), Preprocess(), progress=False)
    assert len(images) == 0 and list(images) == [] and images.names == []
    assert images.labels.shape == (0,) and images.labels.dtype == torch.int64
