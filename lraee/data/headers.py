"""What the first bytes of a picture say: its format, size and orientation, before any pixel.

Every reader here is bounded: by the bytes there are, and by a count of records.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF"]

_SIGNATURES: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"P5", "PPM"),
    (b"P6", "PPM"),
)
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION_TAG = 0x0112


class HeaderError(ValueError):
    """A header that cannot be right; the message is one line."""


def format_of(data: bytes) -> Format | None:
    """The format that the content has, whatever the file is called; None for none of them."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        # The major brand, a version, and the compatible brands
        brands = {data[8:12]} | {data[i : i + 4] for i in range(16, min(_u32(data, 0), 256), 4)}
        if brands & set(_AVIF_BRANDS):
            return "AVIF"
        if brands & set(_HEIF_BRANDS):
            return "HEIF"
    return None


def size_of(data: bytes, form: Format) -> tuple[int, int] | None:
    """Width and height that the header claims; None where only a decoder's own parser knows."""
    if form == "PNG" and data[12:16] == b"IHDR" and len(data) >= 24:
        return _u32(data, 16), _u32(data, 20)
    if form == "GIF" and len(data) >= 10:
        return _u16(data, 6, "<"), _u16(data, 8, "<")
    if form == "BMP" and len(data) >= 26 and _u32(data, 14, "<") >= 40:
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(width), abs(height)
    if form == "WEBP" and data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = int.from_bytes(data[24:27], "little"), int.from_bytes(data[27:30], "little")
        return width + 1, height + 1
    if form == "WEBP" and data[12:16] == b"VP8L" and len(data) >= 25:
        packed = _u32(data, 21, "<")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if form == "WEBP" and data[12:16] == b"VP8 " and len(data) >= 30:
        return _u16(data, 26, "<") & 0x3FFF, _u16(data, 28, "<") & 0x3FFF
    if form == "PPM":
        numbers = re.match(rb"P[56]\s(?:\s|#[^\n]{0,999}\n)*(\d{1,9})\s+(\d{1,9})\s", data[:4096])
        return (int(numbers[1]), int(numbers[2])) if numbers else None
    return None


@dataclass(frozen=True)
class JpegHeader:
    """What decoding needs to know of a JPEG; sizes as stored, before orientation."""

    width: int
    height: int
    components: int
    bits: int
    is_progressive: bool
    is_huffman: bool
    scans: int
    orientation: int
    icc: bytes = field(repr=False, default=b"")


def read_jpeg(data: bytes) -> JpegHeader:
    """Read the segments up to the first scan; raises HeaderError on a stream without a frame."""
    orientation, profile, frame = 1, {}, None
    for marker, start, stop in _jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\x00\x00":
            orientation = exif_orientation(data[start + 6 : stop])
        elif (
            marker == 0xE2 and data[start : start + 12] == b"ICC_PROFILE\x00" and stop - start > 14
        ):
            profile[data[start + 12]] = data[start + 14 : stop]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if stop - start < 6:
                raise HeaderError("a JPEG frame header is cut short")
            frame = marker, start
    if frame is None:
        raise HeaderError("there is no JPEG frame header")
    marker, start = frame
    bits, height, width, components = struct.unpack_from(">BHHB", data, start)
    # Scans follow each other; FF DA is never inside of one, where FF is followed by 00.
    is_progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
    scans = data.count(b"\xff\xda", start) if is_progressive else components
    icc = b"".join(profile[number] for number in sorted(profile))
    return JpegHeader(
        width=width,
        height=height,
        components=components,
        bits=bits,
        is_progressive=is_progressive,
        is_huffman=marker < 0xC8,
        scans=scans,
        orientation=orientation,
        icc=icc,
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of each segment before the first scan."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            following = data.find(b"\xff", at)  # decoders skip garbage between segments
            if following < 0:
                return
            at = following
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stuffing, no length
            at += 2
            continue
        if marker in (0xD9, 0xDA):  # the end, or entropy-coded data
            return
        length = _u16(data, at + 2)
        if length < 2 or at + 2 + length > len(data):
            raise HeaderError("a JPEG segment is cut short")
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of EXIF's first directory, 1 to 8; 1 where none is valid."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 14:
        return 1
    at = _u32(exif, 4, order)
    if at + 2 > len(exif):
        return 1
    entries = min(_u16(exif, at, order), (len(exif) - at - 2) // 12)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        if _u16(exif, entry, order) == _ORIENTATION_TAG and _u16(exif, entry + 2, order) == 3:
            value = _u16(exif, entry + 8, order)
            return value if 1 <= value <= 8 else 1
    return 1


def count_frames(data: bytes, form: Format, limit: int) -> int:
    """Frames of a picture, counted from its records without decoding, up to `limit` + 1."""
    if form == "GIF":
        return _count_gif(data, limit)
    if form == "TIFF":
        return _count_tiff(data, limit)
    if form == "WEBP":
        return max(1, data.count(b"ANMF"))
    if form == "PNG":
        control = data.find(b"acTL", 0, 1 << 16)
        return max(1, _u32(data, control + 4)) if 0 < control < len(data) - 8 else 1
    return 1


def _count_gif(data: bytes, limit: int) -> int:
    frames, size = 0, len(data)
    at = 13 + (3 << ((data[10] & 7) + 1) if size > 10 and data[10] & 0x80 else 0)
    while at < size and frames <= limit:
        if data[at] == 0x2C and at + 10 < size:  # image: descriptor, palette, code size
            frames += 1
            flags = data[at + 9]
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        elif data[at] == 0x21:  # extension
            at += 2
        else:
            break
        while at < size and data[at]:  # blocks of at most 255 bytes
            at += 1 + data[at]
        at += 1
    return frames


def _count_tiff(data: bytes, limit: int) -> int:
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\x00", b"\x00+")
    count_format, link_format, entry = ("Q", "Q", 20) if is_big else ("H", "I", 12)
    count_size, link_size = (
        struct.calcsize(order + count_format),
        struct.calcsize(order + link_format),
    )
    frames, link = 0, 8 if is_big else 4
    while link + link_size <= len(data) and frames <= limit:
        (at,) = struct.unpack_from(order + link_format, data, link)
        if at == 0 or at + count_size > len(data):
            break
        (entries,) = struct.unpack_from(order + count_format, data, at)
        frames += 1
        link = at + count_size + entry * entries
    return frames


def _u16(data: bytes, at: int, order: str = ">") -> int:
    return int.from_bytes(data[at : at + 2], "little" if order == "<" else "big")


def _u32(data: bytes, at: int, order: str = ">") -> int:
    return int.from_bytes(data[at : at + 4], "little" if order == "<" else "big")
