"""Resize, crop and normalisation of one uint8 image, in the bits of Pillow, on one thread.

`resize_reference` is the definition, in plain Python and numpy. `resize` gives the same bits from
C++ (csrc/resize.cpp), or from Pillow itself where the extension is not built.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image
from torch import Tensor

_extension: ModuleType | None
try:
    from lraee import _C as _extension
except ImportError:  # built with LRAEE_BUILD_EXT=0
    _extension = None

Filter = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
Box = tuple[float, float, float, float]
Pixels = npt.NDArray[np.uint8]
Table = npt.NDArray[np.float32]

_WEIGHT_BITS = 22
_SUPPORT: dict[Filter, float] = {
    "box": 0.5,
    "bilinear": 1.0,
    "hamming": 1.0,
    "bicubic": 2.0,
    "lanczos": 3.0,
}
FILTERS = frozenset(_SUPPORT)
# Before 13 Pillow always resized rows first: https://github.com/python-pillow/Pillow/pull/9549
_TALL_IMAGES_COLUMNS_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def implementation() -> Literal["cpu", "pillow"]:
    """What `resize` runs on: the C++ extension, or Pillow where it is not built."""
    return "pillow" if _extension is None else "cpu"


def is_vertical_first(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes columns before rows; the order changes last bits.

    From version 13 on it does where the height shrinks, and by more than twice as many pixels as
    the width.
    """
    shrinks_by = height - size[0]
    return _TALL_IMAGES_COLUMNS_FIRST and shrinks_by > max(0, 2 * (width - size[1]))


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> Table:
    """table[c, v] = (v / 255 - mean[c]) / std[c], each step rounded to float32.

    Returns: float32 [3, 256], the bits of torchvision's ToTensor and Normalize.
    Raises: ValueError on other than three values, or a std that is zero or not finite.
    """
    means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if means.shape != (3,) or stds.shape != (3,):
        raise ValueError(f"normalize: mean and std must have 3 values, got {mean} and {std}")
    if not (np.isfinite(means).all() and np.isfinite(stds).all() and stds.all()):
        raise ValueError(f"normalize: std must be finite and not zero, got {mean} and {std}")
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    return (values - means[:, None]) / stds[:, None]


def resize(
    image: Pixels,
    *,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    box: Box | None = None,
    filter: Filter = "bicubic",
    table: Tensor | None = None,
    channels_first: bool = True,
) -> Tensor:
    """table[c, crop(resize(image))], in the bits of Pillow; only what the crop needs is computed.

    Args:
      image: uint8 [H, W, 3], contiguous.
      size: height and width of the resized image.
      crop: top, left, height and width inside `size`; None keeps all.
      box: left, top, right and bottom of what is resized, in pixels of `image`; None for all.
      filter: Pillow's filter of that name, with antialiasing.
      table: float32 [3, 256], of `normalization_table`; None leaves uint8.
      channels_first: [3, h, w] rather than [h, w, 3]; always so with a table.
    Returns: float32 [3, h, w] with a table, else uint8. Never enters OpenMP, releases the GIL.
    Raises: ValueError on shapes that do not fit.
    """
    height, width = image.shape[:2]
    box = box or (0.0, 0.0, float(width), float(height))
    crop = crop or (0, 0, *size)
    if _extension is None:
        return _by_pillow(image, size, crop, box, filter, table, channels_first)
    resized: Tensor = torch.ops.lraee.resize_crop_normalize(
        torch.from_numpy(image),
        box,
        size,
        crop,
        filter,
        is_vertical_first(height, width, size),
        table,
        channels_first,
    )
    return resized


def _by_pillow(
    image: Pixels,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    box: Box,
    filter: Filter,
    table: Tensor | None,
    channels_first: bool,
) -> Tensor:
    resampling = Image.Resampling[filter.upper()]
    whole = np.array(Image.fromarray(image).resize((size[1], size[0]), resampling, box=box))
    top, left, height, width = crop
    return _laid_out(whole[top : top + height, left : left + width], table, channels_first)


def _laid_out(pixels: Pixels, table: Tensor | None, channels_first: bool) -> Tensor:
    """Pixels [h, w, 3] as the result of `resize`."""
    if table is not None:
        planes = [np.take(table.numpy()[c], pixels[..., c]) for c in range(3)]
        return torch.from_numpy(np.stack(planes))
    ordered = pixels.transpose(2, 0, 1) if channels_first else pixels
    return torch.from_numpy(np.ascontiguousarray(ordered))


def resize_reference(
    image: Pixels,
    *,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    box: Box | None = None,
    filter: Filter = "bicubic",
    table: Tensor | None = None,
    channels_first: bool = True,
) -> Tensor:
    """The definition of `resize`: whole image, one pass per axis, uint8 between the passes."""
    height, width = image.shape[:2]
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    passes: list[tuple[int, float, float, int]] = [
        (1, left, right, size[1]),
        (0, top, bottom, size[0]),
    ]
    if is_vertical_first(height, width, size):
        passes.reverse()
    for axis, begin, end, output in passes:
        if (image.shape[axis], begin, end) != (output, 0, output):
            image = _one_axis(image, axis, np.float32(begin), np.float32(end), output, filter)
    first, second, crop_height, crop_width = crop or (0, 0, *size)
    cropped = image[first : first + crop_height, second : second + crop_width]
    return _laid_out(cropped, table, channels_first)


def _one_axis(
    image: Pixels, axis: int, begin: np.float32, end: np.float32, output: int, filter: Filter
) -> Pixels:
    """y = clip((2^21 + sum_t w[t] * x[start + t]) >> 22, 0, 255) along one axis, in int32."""
    x = np.moveaxis(image, axis, 0).astype(np.int32)
    y = np.empty((output, *x.shape[1:]), np.uint8)
    for i in range(output):
        start, weights = resize_weights(x.shape[0], begin, end, output, filter, i)
        taps = x[start : start + len(weights)]
        total = np.tensordot(np.asarray(weights, np.int32), taps, axes=1)
        y[i] = np.clip((total + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS, 0, 255)
    return np.moveaxis(y, 0, axis)


def resize_weights(
    size: int, begin: np.float32, end: np.float32, output: int, filter: Filter, i: int
) -> tuple[int, list[int]]:
    """First input of output `i`, and its weights in units of 2^-22, rounded half away from zero.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc.
    """
    value = _kernels()[filter]
    scale = float(end - begin) / output
    stretch = max(scale, 1.0)
    support = _SUPPORT[filter] * stretch
    center = float(begin) + (i + 0.5) * scale
    start = max(0, int(center - support + 0.5))
    stop = min(size, int(center + support + 0.5))
    real = [value((x - center + 0.5) * (1.0 / stretch)) for x in range(start, stop)]
    total = 0.0
    for weight in real:  # in this order: sum() of Python 3.12 compensates
        total += weight
    units = [(weight / total if total else weight) * (1 << _WEIGHT_BITS) for weight in real]
    return start, [int(unit + math.copysign(0.5, unit)) for unit in units]


@cache
def _kernels() -> dict[Filter, Callable[[float], float]]:
    # Pillow's constants of single precision
    narrow, wide = float(np.float32(0.54)), float(np.float32(0.46))

    def sinc(x: float) -> float:
        return math.sin(x * math.pi) / (x * math.pi) if x else 1.0

    def hamming(x: float) -> float:
        if not x:
            return 1.0
        x = abs(x) * math.pi
        return math.sin(x) / x * (narrow + wide * math.cos(x)) if x < math.pi else 0.0

    def bicubic(x: float) -> float:
        a, x = -0.5, abs(x)
        if x < 1:
            return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
        return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0

    return {
        "box": lambda x: float(-0.5 < x <= 0.5),
        "bilinear": lambda x: max(0.0, 1.0 - abs(x)),
        "hamming": hamming,
        "bicubic": bicubic,
        "lanczos": lambda x: sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0,
    }
