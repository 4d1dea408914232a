"""Preprocessing: the bits of each transform of open_clip, and the rules of transformers."""

import math
import os
import subprocess
import sys
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from lraee.data.preprocess import Preprocess, from_settings, from_transform
from tests.image_files import encoded, photo
from tests.support import assert_same

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(80, 64), (64, 80), (31, 47), (48, 48), (48, 97), (500, 375), (33, 900), (1, 3), (7, 200)]


def transforms() -> dict[str, Any]:
    return {
        f"{mode}-{interpolation}-{size}": image_transform(
            size, False, MEAN, STD, resize_mode=mode, interpolation=interpolation, fill_color=fill
        )
        for mode in ("shortest", "longest", "squash")
        for interpolation in ("bicubic", "bilinear", "random")
        for size, fill in ((48, 0), ((48, 33), 7))
    }


@pytest.mark.parametrize("name", transforms())
def test_exact_gives_the_bits_of_open_clip(name: str) -> None:
    transform = transforms()[name]
    preprocess = from_transform(transform)
    for size in SIZES:
        if name.startswith("longest") and max(size) > 48 * min(size):
            continue  # a side of 0 pixels: torchvision refuses it
        data = encoded(1, "PNG", size)
        image = Image.open(BytesIO(data))
        actual, picture = preprocess.with_size(data)
        assert_same(actual, transform(image), name=name, size=size)
        assert picture == size[::-1]


@pytest.mark.slow
def test_exact_gives_the_bits_of_open_clip_over_many_sizes() -> None:
    rng = np.random.default_rng(0)
    for name, transform in transforms().items():
        preprocess = from_transform(transform)
        for _ in range(60):
            size = tuple(int(side) for side in rng.integers(20, 700, 2))
            data = encoded(1, "JPEG", size)
            expected = transform(Image.open(BytesIO(data)))
            assert_same(preprocess(data), expected, name=name, size=size)


LEVELS = np.repeat(np.arange(256, dtype=np.float32)[None], 3, axis=0)
"""A table that normalises nothing."""


def test_another_table_gives_the_image_before_normalisation() -> None:
    transform = image_transform(48, False, MEAN, STD)
    preprocess = from_transform(transform)
    data = encoded(1, "JPEG", (80, 64))
    levels = preprocess.with_options(table=LEVELS)(data)
    table = torch.from_numpy(preprocess.table)
    assert_same(
        torch.stack([table[c][levels[c].long()] for c in range(3)]),
        transform(Image.open(BytesIO(data))),
    )
    letterbox = image_transform(48, False, MEAN, STD, resize_mode="longest", fill_color=9)
    padded = from_transform(letterbox).with_options(table=LEVELS)(data)
    assert padded.shape == (3, 48, 48) and (padded[:, 0] == 9).all()


def test_fast_is_near_exact_and_reports_the_whole_size() -> None:
    transform = image_transform(56, False, MEAN, STD)
    data = encoded(2, "JPEG", (1200, 900))
    exact = from_transform(transform).with_options(table=LEVELS)
    fast = exact.with_options(mode="fast")
    assert fast.decode(data).pixels.shape == (113, 150, 3)
    image, size = fast.with_size(data)
    assert size == (900, 1200) and image.shape == (3, 56, 56)
    error = (image - exact(data)).abs()
    assert error.max() <= 6 and error.mean() < 1


def test_a_picture_of_another_mode_is_decoded_first() -> None:
    transform = image_transform(48, False, MEAN, STD)
    grey = photo(1).convert("L")
    file = BytesIO()
    grey.save(file, "PNG")
    assert_same(from_transform(transform)(file.getvalue()), transform(grey))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([T.Resize(8), T.RandomHorizontalFlip(), T.ToTensor()], "got RandomHorizontalFlip"),
        ([T.CenterCrop(8), T.Resize(8)], "Resize is late"),
        ([T.Resize(8), T.Resize(9)], "Resize is late"),
        ([T.Resize(8), T.ToTensor()], "must end with ToTensor and Normalize"),
        ([T.Resize(8), T.Normalize(MEAN, STD)], "must end with ToTensor and Normalize"),
        ([T.Resize(8, T.InterpolationMode.NEAREST)], "got nearest"),
        ([T.Resize(8, max_size=9)], "must have no max_size, got 9"),
    ],
)
def test_unknown_steps_are_named(steps: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"preprocess: .*{message}"):
        from_transform(T.Compose(steps))
    with pytest.raises(ValueError, match="must be a Compose, got <lambda>"):
        from_transform(lambda image: image)


# transformers: its rules, written out

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True, "size": {"shortest_edge": 48}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 48, "width": 48},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD), "do_convert_rgb": True,
}  # fmt: skip
SIGLIP = CLIP | {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 40},
    "do_center_crop": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
}  # fmt: skip
VIT = SIGLIP | {"image_processor_type": "ViTImageProcessor", "resample": 2}
BIT = CLIP | {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 60, "width": 51}}


def by_rules(settings: dict[str, Any], image: Image.Image) -> Tensor:
    size = settings["size"]
    if "shortest_edge" in size:
        short, long = sorted(image.size)
        side, other = size["shortest_edge"], int(size["shortest_edge"] * long / short)
        new = (side, other) if image.width <= image.height else (other, side)
    else:
        new = (size["width"], size["height"])
    x = np.array(image.resize(new, settings["resample"])).transpose(2, 0, 1)
    if settings["do_center_crop"]:
        crop = settings["crop_size"]["height"], settings["crop_size"]["width"]
        canvas = np.zeros(
            (3, *(max(a, b) for a, b in zip(crop, x.shape[1:], strict=True))), np.uint8
        )
        pads = [math.ceil((c - s) / 2) for c, s in zip(canvas.shape[1:], x.shape[1:], strict=True)]
        starts = [(s - c) // 2 + p for s, c, p in zip(x.shape[1:], crop, pads, strict=True)]
        canvas[:, pads[0] : pads[0] + x.shape[1], pads[1] : pads[1] + x.shape[2]] = x
        x = canvas[:, starts[0] : starts[0] + crop[0], starts[1] : starts[1] + crop[1]]
    y = (x.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    mean, std = (
        np.asarray(settings[k], np.float32)[:, None, None] for k in ("image_mean", "image_std")
    )
    return torch.from_numpy((y - mean) / std)


@pytest.mark.parametrize("settings", [CLIP, SIGLIP, VIT, BIT], ids=["clip", "siglip", "vit", "bit"])
def test_settings_follow_the_rules_of_transformers(settings: dict[str, Any]) -> None:
    preprocess = from_settings(settings)
    for size in SIZES:
        data = encoded(1, "PNG", size)
        assert_same(preprocess(data), by_rules(settings, Image.open(BytesIO(data))), size=size)


def test_defaults_of_settings() -> None:
    bare = {"image_mean": list(MEAN), "image_std": list(STD), "size": 48, "crop_size": 40}
    clip = from_settings(bare)
    assert (clip.sizing, clip.size, clip.filter, clip.crop) == (
        "shortest",
        (48, 48),
        "bicubic",
        (40, 40),
    )
    vit = from_settings(bare | {"image_processor_type": "ViTImageProcessor"})
    assert (vit.sizing, vit.size, vit.filter, vit.crop) == ("exact", (48, 48), "bilinear", None)
    raw = from_settings({"do_rescale": False, "do_normalize": False})
    assert raw.table[0, 255] == 255
    none = from_settings({"do_normalize": False, "do_resize": False, "do_center_crop": False})
    assert none(encoded(1, "PNG", (21, 13))).shape == (3, 13, 21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "got DonutImageProcessor"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "got Siglip2ImageProcessor"),
        ({"do_pad": True}, "must have no step do_pad"),
        ({"resample": 0}, "resample must be 1 to 5, got 0"),
        ({"size": {"longest_edge": 9}}, "size must have shortest_edge or height and width"),
        ({"image_std": [0.5, 0.5, 0]}, "std must be finite and not zero"),
        ({"size": {"shortest_edge": 0}}, "size must be positive"),
    ],
)
def test_settings_that_are_not_known_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_settings(CLIP | change)
    with pytest.raises(ValueError, match="mode must be one of"):
        from_settings(CLIP, mode="quick")


def test_a_whole_picture_is_prepared_without_a_new_thread() -> None:
    code = """
import os, sys, threading, time
from lraee.data.preprocess import from_settings
data = open(sys.argv[1], "rb").read()
preprocess = from_settings({"do_normalize": False})
preprocess(data)
before = len(os.listdir("/proc/self/task"))
images = []
thread = threading.Thread(target=lambda: images.append(preprocess(data)))
thread.start(); thread.join()
until = time.monotonic() + 20  # a joined thread may still be about to leave
while len(os.listdir("/proc/self/task")) > before and time.monotonic() < until:
    time.sleep(0.01)
print(len(os.listdir("/proc/self/task")) - before, *images[0].shape)
"""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(encoded(1, "JPEG", (800, 600)))
        file.flush()
        result = subprocess.run(
            [sys.executable, "-c", code, file.name],
            env={**os.environ, "OMP_NUM_THREADS": "4"},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
    assert result.stdout.split() == ["0", "3", "224", "224"]


def test_options_are_checked() -> None:
    base = from_transform(image_transform(8, False, MEAN, STD))
    assert isinstance(base, Preprocess)
    with pytest.raises(ValueError, match="mode must be one of"):
        base.with_options(mode="quick")
