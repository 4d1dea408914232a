"""Pillow's pixel modes as RGB of 8 bits: by what the values mean, not by cutting them off."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from lraee.data.sources import DataError

Pixels = npt.NDArray[np.uint8]

_MAX_PROFILE_BYTES = 4 << 20
_WHITE_IS_ZERO, _BITS, _PHOTOMETRIC = 0, 258, 262  # TIFF


def to_rgb(image: Image.Image, icc: bytes = b"") -> Pixels:
    """Loaded image -> uint8 [H, W, 3], writable.

    Grey of 16 bits: round(v * 255 / white), white being 65535, or 2^bits - 1 of a TIFF with fewer
    bits. Grey of 32-bit integers: the same where all values are in 0..65535 and the file is no
    TIFF, else min..max -> 0..255. Grey of floats: round(255 v) where all values are in 0..1, else
    min..max -> 0..255. RGB of 16 bits: see `sixteen_bits`.
    Transparency lies on white. CMYK: through its ICC profile where that is readable, else Pillow's
    plain formula.
    Raises: DataError on values that have no such meaning; what Pillow raises on other modes.
    """
    if image.mode.startswith("I;16"):
        return _grey(_sixteen_bits(image))
    if image.mode in ("I", "F"):
        return _grey(_scaled(image))
    if image.mode == "CMYK":
        return np.array(_from_cmyk(image, icc))
    if image.has_transparency_data:
        return np.array(_on_white(image))
    return np.array(image.convert("RGB"))


def _grey(values: Pixels) -> Pixels:
    return np.repeat(values[..., None], 3, axis=2)


def _sixteen_bits(image: Image.Image) -> Pixels:
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))
    white = (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1
    if not 255 <= white <= 65535:
        raise DataError(f"has grey of {bits} bits: must be 8 to 16")
    levels = np.minimum(np.arange(65536), white)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = white - levels
    table = ((levels * 255 + white // 2) // white).astype(np.uint8)
    return _by_rows(np.asarray(image), lambda row: table[row])


def _scaled(image: Image.Image) -> Pixels:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise DataError("has values that are not finite: no grey stands for them")
    low, high = float(values.min()), float(values.max())
    is_float = image.mode == "F"
    if is_float and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif not is_float and image.format != "TIFF" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif low == high:
        raise DataError(f"has the value {low:g} everywhere: no grey stands for it")
    scale = 255 / (high - low)
    return _by_rows(values, lambda row: np.rint((row.astype(np.float64) - low) * scale))


def _by_rows(values: npt.NDArray[Any], rule: Callable[[npt.NDArray[Any]], Any]) -> Pixels:
    """Row by row: what the rule needs in between takes up to eight bytes a pixel."""
    result = np.empty(values.shape, np.uint8)
    for row, out in zip(values, result, strict=True):
        out[:] = rule(row)
    return result


def _on_white(image: Image.Image) -> Image.Image:
    whole = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(whole, mask=whole.getchannel("A"))
    return white


def _from_cmyk(image: Image.Image, icc: bytes) -> Image.Image:
    if 128 <= len(icc) <= _MAX_PROFILE_BYTES and icc[16:20] == b"CMYK":
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            return image.convert("RGB")  # a profile that cannot be read says nothing
        if converted is not None:
            return converted
    return image.convert("RGB")
