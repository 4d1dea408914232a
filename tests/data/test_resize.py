"""The resize: reference against Pillow, C++ at every level against Pillow, and what both refuse."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from lraee.data import resize as resizing
from lraee.data.resize import FILTERS, Box, Filter, normalization_table, resize, resize_reference
from tests.support import assert_same

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TABLE = torch.from_numpy(normalization_table(MEAN, STD))
NAMES: tuple[Filter, ...] = ("box", "bilinear", "hamming", "bicubic", "lanczos")


class Case:
    """One random resize: image, size, box, filter and crop."""

    def __init__(self, seed: int, largest: int = 300) -> None:
        rng = random.Random(seed)
        side = lambda: rng.choice((rng.randint(1, 40), rng.randint(1, largest)))  # noqa: E731
        self.height, self.width, self.size = side(), side(), (side(), side())
        if rng.random() < 0.2:
            self.size = (self.size[0], self.width)
        if rng.random() < 0.2:
            self.size = (self.height, self.size[1])
        pixels = np.random.default_rng(seed).integers(
            0, 256, (self.height, self.width, 3), dtype=np.uint8
        )
        self.image = (pixels > 127) * np.uint8(255) if rng.random() < 0.3 else pixels
        self.filter: Filter = rng.choice(NAMES)
        self.box: Box = (0.0, 0.0, float(self.width), float(self.height))
        if rng.random() < 0.4:
            left, right = sorted(rng.uniform(0, self.width) for _ in range(2))
            top, bottom = sorted(rng.uniform(0, self.height) for _ in range(2))
            if min(right - left, bottom - top) > 0.01:
                self.box = (left, top, right, bottom)
        top, left = rng.randrange(self.size[0]), rng.randrange(self.size[1])
        bottom, right = rng.randint(top + 1, self.size[0]), rng.randint(left + 1, self.size[1])
        self.crop = (top, left, bottom - top, right - left)

    def by_pillow(self) -> Tensor:
        resampling = Image.Resampling[self.filter.upper()]
        size = (self.size[1], self.size[0])
        whole = np.array(Image.fromarray(self.image).resize(size, resampling, box=self.box))
        top, left, height, width = self.crop
        return torch.from_numpy(whole[top : top + height, left : left + width].copy())

    def arguments(self) -> dict[str, object]:
        return {"size": self.size, "crop": self.crop, "box": self.box, "filter": self.filter}


def levels() -> list[str]:
    extension = pytest.importorskip("lraee._C")
    return [level for level in extension.isa_levels() if level not in ("avx_vnni", "amx")]


def check_levels(seeds: range, largest: int) -> None:
    from lraee import _C

    for level in levels():
        _C.set_isa(level)
        try:
            for seed in seeds:
                case = Case(seed, largest)
                actual = resize(case.image, **case.arguments(), channels_first=False)  # type: ignore[arg-type]
                assert_same(actual, case.by_pillow(), level=level, seed=seed, **case.arguments())
        finally:
            _C.set_isa("")


def test_every_level_gives_the_bits_of_pillow() -> None:
    check_levels(range(150), 300)


@pytest.mark.slow
def test_every_level_gives_the_bits_of_pillow_over_many_sizes() -> None:
    check_levels(range(1000, 6000), 700)


def test_the_reference_gives_the_bits_of_pillow() -> None:
    filters = set()
    for seed in range(60):
        case = Case(seed, 90)
        actual = resize_reference(case.image, **case.arguments(), channels_first=False)  # type: ignore[arg-type]
        assert_same(actual, case.by_pillow(), seed=seed, **case.arguments())
        filters.add(case.filter)
    assert filters == FILTERS


def test_without_the_extension_pillow_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(seed, 90) for seed in range(20)]
    for table, channels_first in ((TABLE, True), (None, True), (None, False)):
        arguments = [
            case.arguments() | {"table": table, "channels_first": channels_first} for case in cases
        ]
        pairs = list(zip(cases, arguments, strict=True))
        results = [resize(case.image, **each) for case, each in pairs]  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(resizing, "_extension", None)
            assert resizing.implementation() == "pillow"
            for (case, each), result in zip(pairs, results, strict=True):
                assert_same(resize(case.image, **each), result)  # type: ignore[arg-type]


def test_tall_images_are_resized_down_first_by_pillow_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_TALL_IMAGES_COLUMNS_FIRST", True)
    assert resizing.is_vertical_first(100, 50, (40, 50))
    assert resizing.is_vertical_first(100, 80, (40, 51))  # 60 > 2 * 29
    assert not resizing.is_vertical_first(100, 80, (40, 50))  # 60 = 2 * 30
    assert not resizing.is_vertical_first(100, 80, (100, 200))
    monkeypatch.setattr(resizing, "_TALL_IMAGES_COLUMNS_FIRST", False)
    assert not resizing.is_vertical_first(100, 50, (40, 50))


def test_a_hand_worked_box() -> None:
    image = np.repeat(np.array([[10, 20, 31, 40]], np.uint8)[..., None], 3, axis=2)
    halved = resize(image, size=(1, 2), filter="box")
    assert_same(halved[0], torch.tensor([[15, 36]], dtype=torch.uint8))  # 35.5 rounds up


def test_floats_are_those_of_torchvision() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert_same(resize(every, size=(16, 16), table=TABLE), _by_torchvision(every))
    case = Case(7)
    pixels = resize(case.image, size=(60, 70), channels_first=False).numpy()
    assert_same(resize(case.image, size=(60, 70), table=TABLE), _by_torchvision(pixels))


def _by_torchvision(pixels: np.ndarray) -> Tensor:
    return F.normalize(F.to_tensor(Image.fromarray(pixels)), MEAN, STD)


def test_layouts_hold_the_same_pixels() -> None:
    case = Case(3)
    rows = resize(case.image, size=(20, 30), channels_first=False)
    planes = resize(case.image, size=(20, 30))
    assert rows.shape == (20, 30, 3) and planes.shape == (3, 20, 30)
    assert_same(planes, rows.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((4, 4), np.uint8), {}, r"image must have shape \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), {}, r"image must have shape \[H, W, 3\] and pixels"),
        (np.zeros((4, 8, 3), np.uint8)[:, ::2], {}, "image must be contiguous"),
        (np.zeros((4, 4, 3), np.uint8), {"size": (0, 2)}, "size must be .* both positive"),
        (np.zeros((4, 4, 3), np.uint8), {"crop": (0, 1, 2, 2)}, "crop must be .* inside size"),
        (np.zeros((4, 4, 3), np.uint8), {"crop": (-1, 0, 2, 2)}, "crop must be .* inside size"),
        (np.zeros((4, 4, 3), np.uint8), {"box": (0, 0, 5, 4)}, "box must be .* inside the image"),
        (np.zeros((4, 4, 3), np.uint8), {"box": (2, 0, 2, 4)}, "box must be .* inside the image"),
        (np.zeros((4, 4, 3), np.uint8), {"filter": "nearest"}, "filter must be box, .*'nearest'"),
        (np.zeros((4, 4, 3), np.uint8), {"table": torch.zeros(3, 255)}, "table must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    image: np.ndarray, arguments: dict[str, object], message: str
) -> None:
    pytest.importorskip("lraee._C")
    with pytest.raises(ValueError, match=f"resize_crop_normalize: {message}"):
        resize(image, **({"size": (2, 2)} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5, 0.5), (0.5, 0.5)), (MEAN, (0.5, 0.0, 0.5)), ((0, float("nan"), 0), STD)],
)
def test_a_table_of_unusable_statistics_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="normalize: "):
        normalization_table(mean, std)


def test_nothing_enters_openmp_and_the_gil_is_free() -> None:
    """In a process of its own: no thread appears, and another thread runs during a long resize."""
    levels()
    code = """
import os, threading, time, numpy as np
from lraee.data.resize import resize
image = np.zeros((4000, 4000, 3), np.uint8)
resize(image[:40, :40].copy(), size=(20, 20))
before = len(os.listdir("/proc/self/task"))
work = threading.Thread(target=lambda: resize(image, size=(2000, 2000), filter="lanczos"))
work.start()
ticks = 0
while work.is_alive():
    ticks += 1
    time.sleep(0)
work.join()
until = time.monotonic() + 20  # a joined thread may still be about to leave
while len(os.listdir("/proc/self/task")) > before and time.monotonic() < until:
    time.sleep(0.01)
print(len(os.listdir("/proc/self/task")) - before, ticks > 10)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert result.stdout.split() == ["0", "True"]
