"""Files that were made to break a decoder: random mutations, and bombs of each kind."""

import random
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from tests.image_files import encoded, photo, png_bomb


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def whole_files(size: tuple[int, int] = (40, 33)) -> dict[str, bytes]:
    """One small file of each of 12 kinds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [photo(i, size) for i in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    return {
        "jpeg": _saved(frames[0], "JPEG", exif=exif, icc_profile=bytes(200)),
        "progressive": _saved(frames[0], "JPEG", progressive=True),
        "cmyk": _saved(frames[0].convert("CMYK"), "JPEG"),
        "png": encoded(1, "PNG", size),
        "palette": _saved(frames[0].quantize(16), "PNG", transparency=3),
        "webp": encoded(1, "WEBP", size),
        "frames": _saved(frames[0], "WEBP", **several),
        "gif": _saved(frames[0], "GIF", **several),
        "bmp": encoded(1, "BMP", size),
        "tiff": _saved(frames[0], "TIFF", compression="tiff_lzw"),
        "ppm": encoded(1, "PPM", size),
        "avif": encoded(1, "AVIF", size),
    }


def mutated(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` files: bytes changed, cut out, repeated or cut off; a third in the first 64 bytes."""
    rng = random.Random(seed)
    files = list(whole_files().items())
    for i in range(count):
        name, whole = files[i % len(files)]
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(data), 64) if rng.random() < 0.33 else len(data))
            kind = rng.random()
            if kind < 0.6:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif kind < 0.75:
                del data[at : at + rng.randint(1, 20)]
            elif kind < 0.9:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            else:
                data[at + 1 :] = b""
            if len(data) < 2:
                break
        yield f"{name}-{i}", bytes(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def _png(width: int, height: int, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(bytes(2000))
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _deflated(size: int) -> bytes:
    """`size` zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def _tiff(entries: dict[int, int], pixels: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory of 32-bit values; pixels start at byte 256."""
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    head = b"II*\x00" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)
    return head.ljust(256, b"\x00") + pixels


_GREY = {258: 8, 259: 1, 262: 1, 277: 1}


def _jpeg_of(width: int, height: int, form: bytes = b"\xc0") -> bytes:
    """A whole JPEG whose frame header claims another size."""
    data = _saved(photo(1, (16, 16)), "JPEG", progressive=form == b"\xc2")
    at = data.index(b"\xff" + form) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _segments(marker: bytes, payload: bytes, count: int) -> bytes:
    """A JPEG with `count` segments of this payload before its own."""
    segment = b"\xff" + marker + struct.pack(">H", len(payload) + 2) + payload
    data = encoded(1, "JPEG", (16, 16))
    return data[:2] + segment * count + data[2:]


def _gif_of_frames(count: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * count + b"\x3b"


def _exif(entries: int, at: int = 8) -> bytes:
    return b"Exif\x00\x00II*\x00" + struct.pack("<IH", at, entries) + bytes(2000)


def bombs() -> dict[str, bytes]:
    """30 files of small size and large demands."""
    zeros = _deflated(256 << 20)
    big = 60_000
    scans = _saved(photo(1, (64, 64)), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    vp8x = b"VP8X" + struct.pack("<IB3x", 10, 2) + b"\xff\xff\xff" * 2
    return {
        "png-dimensions": png_bomb(big, big),
        "png-negative": _png(0xFFFFFFFF, 0xFFFFFFFF),
        "png-empty": _png(0, 10),
        "png-deep": _png(13_000, 13_000, depth=16, color=6),
        "png-pixels": _png(12_000, 12_000),
        "png-iTXt": _png(8, 8, extra=chunk(b"iTXt", b"k\x00\x01\x00\x00\x00" + zeros)),
        "png-zTXt": _png(8, 8, extra=chunk(b"zTXt", b"k\x00\x00" + zeros)),
        "png-iCCP": _png(8, 8, extra=chunk(b"iCCP", b"k\x00\x00" + zeros)),
        "png-many-zTXt": _png(
            8, 8, extra=chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(1 << 20))) * 500
        ),
        "png-acTL": _png(8, 8, extra=chunk(b"acTL", struct.pack(">II", 1 << 31, 0))),
        "png-inflates": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zeros)
        + chunk(b"IEND", b""),
        "jpeg-dimensions": _jpeg_of(65_535, 65_535),
        "jpeg-large": _jpeg_of(12_000, 12_000),
        "jpeg-progressive": _jpeg_of(13_000, 13_000, b"\xc2"),
        "jpeg-scans": scans[:last] + scans[last:-2] * 5000 + scans[-2:],
        "jpeg-exif-entries": _segments(b"\xe1", _exif(65_535), 1),
        "jpeg-exif-offset": _segments(b"\xe1", _exif(1, 0xFFFFFFF0), 1),
        "jpeg-exif-loop": _segments(b"\xe1", _exif(0, 8), 300),
        "jpeg-icc": _segments(b"\xe2", b"ICC_PROFILE\x00\x01\xff" + bytes(65_000), 300),
        "jpeg-comments": _segments(b"\xfe", b"", 500_000),
        "gif-frames": _gif_of_frames(200_000),
        "gif-screen": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + bytes(50),
        "webp-canvas": b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x,
        "bmp-dimensions": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, big, -big, 1, 24, 0, 0, 0, 0, 0, 0),
        "tiff-tile": _tiff({256: 4, 257: 4, 322: big, 323: big, 324: 256, 325: 16, **_GREY}),
        "tiff-dimensions": _tiff({256: big, 257: big, 273: 256, 278: big, 279: 9, **_GREY}),
        "tiff-deflate": _tiff(
            {256: 9000, 257: 9000, 273: 256, 278: 9000, 279: len(zeros), **_GREY, 259: 8}, zeros
        ),
        "tiff-loop": b"II*\x00" + struct.pack("<I", 8) + struct.pack("<HI", 0, 8),
        "ppm-dimensions": b"P6 999999999 999999999 255\n" + bytes(100),
        "nested": _saved(Image.new("L", (8, 8)), "TIFF") + png_bomb(big, big) + zeros[:1000],
    }
