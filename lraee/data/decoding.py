"""The one way from a picture's bytes to RGB pixels: what a viewer shows, or an error with a reason.

Every file is hostile until checked: bytes before headers, headers before pixels, time and memory
estimated from the header before anything of the picture's size is allocated.
"""

import importlib.util
import threading
import time
import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lraee.data.headers import (
    Format,
    HeaderError,
    JpegHeader,
    count_frames,
    format_of,
    read_jpeg,
    size_of,
)
from lraee.data.modes import to_rgb
from lraee.data.sixteen_bits import is_deep, mend_planes, rounded
from lraee.data.sources import DataError, first_line

try:
    import simplejpeg
except ImportError:  # extra `embed`
    simplejpeg = None

Mode = Literal["exact", "fast"]
Pixels = npt.NDArray[np.uint8]
Target = int | tuple[int, int] | None

# Bytes of memory per pixel at the peak. Pillow holds 4, a conversion 4 more, the array 3, and
# turning it another 3, when the conversion is gone. Progressive JPEG keeps coefficients of the
# whole picture, 2 bytes each, whatever the scale.
_PILLOW_BYTES, _JPEG_BYTES, _COEFFICIENT_BYTES = 12, 6, 2
# Of 16-bit RGB that is rounded: two pictures of 4, their arrays of 4 each, and the result, twice
_ROUNDED_BYTES = 24
# A block of 8 x 8 pixels takes one bit of a Huffman-coded JPEG at least. Decoders fill what is
# missing with grey, without an error.
_PIXELS_PER_BYTE = 8 * 64
# Nanoseconds per pixel: three times the CPU time that the worse of a photo and noise took on one
# core of an EPYC (Zen 5), 2026-11: JPEG 14.1, PNG 25.3, WebP 48.9, GIF 6.9, BMP 1.2, TIFF 14.1, PPM
# 1.1, AVIF 61.0, HEIF 81.2; a PPM of other than 255 levels, which Pillow decodes in Python, 1234.
# Command: python -m bench.preprocess costs
_NANOSECONDS: dict[Format, int] = {
    "JPEG": 45, "PNG": 75, "WEBP": 150, "GIF": 20, "BMP": 4, "TIFF": 45, "PPM": 4,
    "AVIF": 180, "HEIF": 240,
}  # fmt: skip
_PPM_IN_PYTHON_NANOSECONDS = 3700
_OPENING = threading.Lock()


class DecodeError(DataError):
    """One picture that cannot be used; the message is one line that follows its name."""


@dataclass(frozen=True)
class Limits:
    """What is refused, each before it is paid for.

    max_bytes, max_pixels, max_frames, max_scans (of a progressive JPEG) and max_aspect are read
    from the file. max_memory_bytes bounds the estimated peak of decoding; the default lets Pillow
    decode 67 million pixels, and simplejpeg 134. max_seconds bounds the time estimated from the
    pixels before decoding, and is checked again between stages: nothing stops a decoder inside.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 178_956_970
    max_frames: int = 10_000
    max_scans: int = 100
    max_aspect: float = 50.0
    max_memory_bytes: int = 768 << 20
    max_seconds: float = 20.0


@dataclass(frozen=True)
class Decoded:
    """Pixels uint8 [H, W, 3], upright; width and height of the whole picture, upright, unscaled."""

    pixels: Pixels
    width: int
    height: int


def decoder_name() -> Literal["simplejpeg", "pillow"]:
    """What decodes JPEG here; both give the same bits."""
    return "pillow" if simplejpeg is None else "simplejpeg"


def decode(
    data: bytes,
    *,
    limits: Limits | None = None,
    target: Target = None,
    mode: Mode = "exact",
) -> Decoded:
    """Decode one picture to upright RGB.

    Args:
      data: the file; its format is told by its content.
      limits: what is refused.
      target: shorter side, or height and width, that the pixels will be resized to.
      mode: "fast" lets a JPEG be scaled down while it is decoded, by 2, 4 or 8, as long as it stays
        at least twice the target, and rounds RGB of 16 bits; "exact" never scales, and takes the
        high byte of RGB of 16 bits, as Pillow does.
    Raises: DecodeError with the reason, and nothing else.

    Turned as EXIF says. Transparency lies on white. 16-bit and float grey: see `modes.to_rgb`;
    16-bit RGB: `sixteen_bits`. Of several frames the first. An ICC profile is applied to CMYK only,
    because models were trained on RGB as stored.
    """
    clock = _Clock(limits or Limits())
    try:
        return _decode(data, clock, target, mode)
    except DataError as error:
        raise error if isinstance(error, DecodeError) else DecodeError(str(error)) from error
    except HeaderError as error:
        raise DecodeError(f"is not a whole image: {error}") from error
    except Exception as error:  # what decoders raise on hostile bytes is not a closed list
        raise DecodeError(f"is not a whole image: {first_line(error)}") from error


class _Clock:
    """The limits, and the time since the start."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self._start = limits, time.monotonic()

    def check(self) -> None:
        seconds = time.monotonic() - self._start
        if seconds > self.limits.max_seconds:
            raise DecodeError(f"took {seconds:.1f} s, more than {self.limits.max_seconds:g}")


def _decode(data: bytes, clock: _Clock, target: Target, mode: Mode) -> Decoded:
    limits = clock.limits
    if len(data) > limits.max_bytes:
        raise DecodeError(f"has {len(data)} bytes, more than {limits.max_bytes}")
    form = format_of(data)
    if form is None:
        raise DecodeError(f"is not a whole image: {_beginning(data)}")
    if (size := size_of(data, form)) is not None:
        _check_size(*size, limits)
    frames = count_frames(data, form, limits.max_frames)
    if frames > limits.max_frames:
        raise DecodeError(f"has more than {limits.max_frames} frames")
    if form == "JPEG":
        return _jpeg(data, clock, target if mode == "fast" else None)
    return _other(data, form, clock, mode)


def _beginning(data: bytes) -> str:
    return f"begins with {ascii(data[:8])[2:-1]}" if data else "is empty"


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise DecodeError(f"is not a whole image: has {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise DecodeError(f"has {width} x {height} pixels, more than {limits.max_pixels}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise DecodeError(f"is {width} x {height}, longer than {limits.max_aspect:g} : 1")


def _check_cost(seconds: float, memory_bytes: float, limits: Limits) -> None:
    if memory_bytes > limits.max_memory_bytes:
        needed, allowed = int(memory_bytes) >> 20, limits.max_memory_bytes >> 20
        raise DecodeError(f"would take {needed} MiB to decode, more than {allowed}")
    if seconds > limits.max_seconds:
        raise DecodeError(f"would take {seconds:.1f} s to decode, more than {limits.max_seconds:g}")


def _jpeg(data: bytes, clock: _Clock, target: Target) -> Decoded:
    header, limits = read_jpeg(data), clock.limits
    _check_size(header.width, header.height, limits)
    if header.bits != 8 or header.components not in (1, 3, 4):
        raise DecodeError(f"has {header.components} components of {header.bits} bits: must be 8")
    if header.is_progressive and header.scans > limits.max_scans:
        raise DecodeError(f"has {header.scans} scans, more than {limits.max_scans}")
    scale = _scale(header, target)
    pixels = header.width * header.height
    if header.is_huffman and len(data) * _PIXELS_PER_BYTE < pixels:
        raise DecodeError(
            f"is not a whole image: {len(data)} bytes cannot hold {header.width} x {header.height}"
        )
    is_pillow = simplejpeg is None or header.components == 4
    memory_bytes = (_PILLOW_BYTES if is_pillow else _JPEG_BYTES) * pixels / scale**2
    if header.is_progressive:
        memory_bytes += _COEFFICIENT_BYTES * header.components * pixels
    # A scan of a progressive picture visits each block again.
    passes = max(1.0, header.scans / 4) if header.is_progressive else 1.0
    _check_cost(pixels * _NANOSECONDS["JPEG"] * passes * 1e-9, memory_bytes, limits)
    array = None if is_pillow else _by_simplejpeg(data, header, scale)
    if array is None:
        array = _jpeg_by_pillow(data, header, scale)
    clock.check()
    return _upright(array, header.orientation, header.width, header.height)


def _scale(header: JpegHeader, target: Target) -> int:
    """The largest of 8, 4, 2 that leaves at least twice the target, else 1."""
    if target is None:
        return 1
    if isinstance(target, int):
        sides = [(min(header.width, header.height), target)]
    else:
        is_turned = header.orientation >= 5
        height, width = target[::-1] if is_turned else target
        sides = [(header.height, height), (header.width, width)]
    fitting = (s for s in (8, 4, 2) if all(-(-side // s) >= 2 * least for side, least in sides))
    return next(fitting, 1)


def _by_simplejpeg(data: bytes, header: JpegHeader, scale: int) -> Pixels | None:
    """Pixels as stored, or None where libjpeg warns: Pillow then says whether that is an error."""
    least = {"min_height": -(-header.height // scale), "min_width": -(-header.width // scale)}
    try:
        array: Pixels = simplejpeg.decode_jpeg(data, "RGB", **(least if scale > 1 else {}))
    except (ValueError, RuntimeError):
        return None
    return array if array.shape[:2] == tuple(least.values()) else None


def _jpeg_by_pillow(data: bytes, header: JpegHeader, scale: int) -> Pixels:
    image = _opened(data, "JPEG")
    if scale > 1:
        # Pillow takes the largest scale that leaves at least this size.
        image.draft(None, (header.width // scale, header.height // scale))
    image.load()
    return to_rgb(image, header.icc)


def _other(data: bytes, form: Format, clock: _Clock, mode: Mode) -> Decoded:
    image = _opened(data, form)
    width, height = image.size
    _check_size(width, height, clock.limits)
    pixels = width * height + _tile_pixels(image)
    mend_planes(image)
    is_rounded = mode == "fast" and is_deep(image)
    seconds = pixels * _nanoseconds(image, form) * 1e-9 * (2 if is_rounded else 1)
    bytes_each = _ROUNDED_BYTES if is_rounded else _PILLOW_BYTES
    _check_cost(seconds, pixels * bytes_each, clock.limits)
    clock.check()
    icc = image.info.get("icc_profile") or b""
    if is_rounded:
        again = _opened(data, form)
        mend_planes(again)
        array = to_rgb(rounded(image, again), icc)
    else:
        image.load()
        clock.check()
        array = to_rgb(image, icc)
    # TIFF is turned by Pillow while it loads, which drops the tag.
    orientation = image.getexif().get(0x0112, 1)
    width, height = image.size
    clock.check()
    return _upright(array, orientation if orientation in range(1, 9) else 1, width, height)


def _nanoseconds(image: Image.Image, form: Format) -> int:
    is_in_python = any(tile[0] == "ppm" for tile in getattr(image, "tile", []))
    return _PPM_IN_PYTHON_NANOSECONDS if is_in_python else _NANOSECONDS[form]


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of one tile or strip of a TIFF, which its decoder holds beside the picture."""
    tags = getattr(image, "tag_v2", {})
    if 322 in tags or 323 in tags:
        return int(tags.get(322, 1)) * int(tags.get(323, 1))
    return image.width * min(int(tags.get(278, 0) or 0), image.height) if tags else 0


def _opened(data: bytes, form: Format) -> Image.Image:
    """The picture with its header read, by Pillow, as this format and no other."""
    if form == "HEIF" and not _register_heif():
        raise DecodeError("is HEIC, which needs a decoder: pip install pillow-heif")
    # Filters of warnings belong to the process, so one thread at a time changes them.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(BytesIO(data), formats=(form,))


@cache
def _register_heif() -> bool:
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _upright(array: Pixels, orientation: int, width: int, height: int) -> Decoded:
    """Turn and mirror as EXIF's orientation says; width and height are those of the whole."""
    if orientation >= 5:  # rows are stored as columns
        array, width, height = array.transpose(1, 0, 2), height, width
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return Decoded(np.ascontiguousarray(array), width, height)
