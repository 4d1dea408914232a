"""RGB, RGBA and CMYK of 16 bits a channel, of which Pillow keeps the high bytes alone.

Its unpackers of the other byte order read the low bytes, so a second pass over the file gives them.
PNG and TIFF come here; a PPM of 16 bits and an AVIF of 10 or 12 are rounded by their decoders.
"""

from typing import Any

import numpy as np
from PIL import Image

_OTHER_ORDER = {"B": "L", "L": "B", "N": "B"}
"""Last letters of Pillow's raw modes; N is the order of this machine, which is little-endian."""
_GREY_AND_ALPHA = "LA;16B"
_PLANES = ("R", "G", "B", "A")
_BITS = 258  # TIFF


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is opened and not loaded has 16 bits in each of several channels."""
    return any(_is_deep(_raw_mode(tile)) for tile in _tiles(image))


def mend_planes(image: Image.Image) -> None:
    """Before loading: uncompressed TIFF planes of 16 bits, which Pillow would read as of 8."""
    bits = getattr(image, "tag_v2", {}).get(_BITS, ())
    if not isinstance(bits, tuple) or set(bits) != {16}:
        return
    order = "B" if image.tag_v2.prefix == b"MM" else "L"  # type: ignore[attr-defined]
    image.tile = [  # type: ignore[attr-defined]
        _read_as(tile, f"{_raw_mode(tile)};16{order}") if _raw_mode(tile) in _PLANES else tile
        for tile in _tiles(image)
    ]


def rounded(image: Image.Image, again: Image.Image) -> Image.Image:
    """round(v / 257) of each channel, 8 bits; a PNG's transparent colour becomes alpha.

    Args:
      image: opened, for which `is_deep` holds; it will be loaded.
      again: the same file, opened once more.
    Premultiplied alpha, and compressed planes of their own, keep the high byte: one level less at
    most.
    """
    lanes = [0, 1, 2, 3]
    if _raw_mode(_tiles(image)[0]) == _GREY_AND_ALPHA:
        lanes = [1, 1, 1, 3]  # of high and low byte of grey, of alpha
    again.tile = [_read_as(tile, _low(_raw_mode(tile))) for tile in _tiles(again)]  # type: ignore[attr-defined]
    image.load()
    again.load()
    high, low = np.asarray(image), np.asarray(again)
    lanes = lanes[: high.shape[2]]
    colour = image.info.get("transparency") if image.mode == "RGB" else None
    result = np.empty((*high.shape[:2], high.shape[2] + (colour is not None)), np.uint8)
    for high_row, low_row, out in zip(high, low, result, strict=True):
        h, lo = high_row.astype(np.int32), low_row[:, lanes].astype(np.int32)
        # v = 257 h + (lo - h)
        out[:, : len(lanes)] = h + (lo - h > 128) - (h - lo > 128)
        if colour is not None:
            out[:, 3] = np.where(((h << 8 | lo) == colour).all(axis=1), 0, 255)
    mode = image.mode if colour is None else "RGBA"
    return Image.frombuffer(mode, image.size, result.tobytes(), "raw", mode, 0, 1)


def _is_deep(raw_mode: str) -> bool:
    name, _, depth = raw_mode.partition(";")
    return depth[:2] == "16" and name in ("RGB", "RGBX", "RGBA", "CMYK", "LA", *_PLANES)


def _low(raw_mode: str) -> str:
    """The raw mode that reads the low bytes."""
    if raw_mode == _GREY_AND_ALPHA:
        return "RGBA"
    return raw_mode[:-1] + _OTHER_ORDER[raw_mode[-1]]


def _tiles(image: Image.Image) -> list[Any]:
    return getattr(image, "tile", [])


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _read_as(tile: Any, raw_mode: str) -> Any:
    arguments = tile[3]
    new = (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode
    # A plain tuple before Pillow 11
    return tile._replace(args=new) if hasattr(tile, "_replace") else (*tile[:3], new)
