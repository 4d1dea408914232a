"""Calibration images that cannot be used are refused in one line; those that can, in any form."""

import re
from typing import Any

import pytest
import torch

import lraee
from lraee.model.accelerate import accelerate
from lraee.quantization.images import Calibration, chunk_of, read_tokens
from tests.clip_models import IMAGE_SIZE, make_model
from tests.small_calibration import pictures, small_clip
from tests.support import assert_same

SIZE = IMAGE_SIZE


def spoiled() -> torch.Tensor:
    images = pictures(64)
    images[5, 0, 0, 0] = torch.nan
    return images


FEW = "images must be 64 to 256, got {}; give 128"
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (torch.empty(0, 3, SIZE, SIZE), ValueError, FEW.format(0)),
    "no batch": ([], ValueError, FEW.format(0)),
    "one": (pictures(1), ValueError, FEW.format(1)),
    "too many": (torch.zeros(257, 3, SIZE, SIZE), ValueError, "got 257 or more"),
    "NaN": (spoiled(), ValueError, "must be finite, got NaN or Inf; leave such images out"),
    "small": (torch.zeros(64, 3, 16, 16), ValueError, "must be at least 32 x 32, got 16 x 16"),
    "labels": (
        [(pictures(64), torch.zeros(64))], TypeError,
        "got a tuple of 2; calibration takes no labels, give the images alone",
    ),
    "integers": (torch.zeros(64, 3, SIZE, SIZE, dtype=torch.uint8), TypeError, "got torch.uint8"),
    "one image": (torch.zeros(3, SIZE, SIZE), TypeError, "calibration must be float [n, 3, H, W]"),
    "a number": (7, TypeError, "or an iterable of such batches, got int"),
    "a path": ("photos", TypeError, "or an iterable of such batches, got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    images, kind, line = REFUSED[case]
    with pytest.raises(kind, match="^accelerate: calibration") as caught:
        accelerate(make_model(vision={"layers": 1}), calibration=images)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_half_a_request_is_refused() -> None:
    model = make_model(vision={"layers": 1})
    with pytest.raises(ValueError, match="int8-calibrated must come with calibration=<64 to 256"):
        accelerate(model, scheme="int8-calibrated")
    for scheme in ("paper", "int8-patches"):
        with pytest.raises(ValueError, match="^accelerate: calibration must have a scheme with"):
            accelerate(model, scheme=scheme, calibration=pictures(64))


def test_a_tensor_and_batches_are_the_same() -> None:
    fast = accelerate(small_clip()).visual
    images = pictures(70)
    tokens, digest = read_tokens(fast, images)
    assert tokens.shape == (70, 17, 32) and tokens.dtype == torch.float32
    for batches in (images.split(13), iter(images.split(32)), [images]):
        again, same = read_tokens(fast, batches)
        assert_same(again, tokens)
        assert same == digest
    assert read_tokens(fast, images.flip(0))[1] != digest


def test_the_centre_of_larger_images() -> None:
    fast = accelerate(small_clip()).visual
    images = torch.nn.functional.pad(pictures(64), (3, 5, 2, 4))
    tokens, _ = read_tokens(fast, images)
    centre = images[..., (38 - 32) // 2 :, (40 - 32) // 2 :][..., :32, :32]
    assert_same(tokens, read_tokens(fast, centre)[0])


def test_a_limit_that_nothing_fits_names_the_least() -> None:
    shape = {"n": 128, "L": 257, "width": 384, "widest": 1536, "products": 100 << 20}
    with pytest.raises(ValueError, match="memory_mb must be at least") as caught:
        chunk_of(**shape, memory_mb=50)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert chunk_of(**shape, memory_mb=least) == 8  # 2,056 tokens
    assert chunk_of(**shape, memory_mb=4096) == 8
    assert chunk_of(**{**shape, "L": 50}, memory_mb=4096) == 16  # an eighth of the images
    with pytest.raises(ValueError, match="^accelerate: calibration memory_mb must be at least"):
        given = Calibration(pictures(64), memory_mb=1, progress=False)
        lraee.accelerate(small_clip(), calibration=given)
