"""RGB of 16 bits: rounded by `fast`, cut off by `exact` as Pillow does."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lraee.data.decoding import DecodeError, Limits, decode

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 61, 47


def values(channels: int) -> np.ndarray:
    """Random 16-bit values, and those around each boundary of two levels."""
    x = RNG.integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    edges = np.arange(257)[:, None] * 257 + np.array([-129, -128, 128, 129])
    x.reshape(-1)[: edges.size] = edges.clip(0, 65535).ravel()
    return x


def levels(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.int64) * 255 + 32767) // 65535


def png(
    x: np.ndarray, kind: int, *, transparent: bytes = b"", is_interlaced: bool = False
) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    passes = [(0, 0, 1, 1)]
    if is_interlaced:  # Adam7
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                  (0, 1, 2, 2), (1, 0, 2, 1)]  # fmt: skip
    rows = [row for y, x0, dy, dx in passes for row in x[y::dy, x0::dx].astype(">u2")]
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, kind, 0, 0, is_interlaced)
    trns = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + trns + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    x: np.ndarray, *, order: str = "<", is_packed: bool = False, has_planes: bool = False,
    orientation: int = 1, photometric: int = 2, extra: int | None = None,
) -> bytes:  # fmt: skip
    """One strip, or one a plane, plain or deflated."""
    planes = list(np.moveaxis(x, 2, 0)) if has_planes else [x]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if is_packed else strips
    H, W, C = x.shape
    offsets, at = [], 8
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    tags: list[tuple[int, list[int]]] = [
        (256, [W]), (257, [H]), (258, [16] * C), (259, [8 if is_packed else 1]),
        (262, [photometric]), (273, offsets), (274, [orientation]), (277, [C]), (278, [H]),
        (279, [len(strip) for strip in strips]), (284, [2 if has_planes else 1]),
    ]  # fmt: skip
    if extra is not None:
        tags.append((338, [extra]))
    heap_at = at + 2 + 12 * len(tags) + 4
    directory, heap = struct.pack(f"{order}H", len(tags)), b""
    for tag, numbers in tags:
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            data, heap = struct.pack(f"{order}I", heap_at + len(heap)), heap + data
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + data
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return start + b"".join(strips) + directory + struct.pack(f"{order}I", 0) + heap


def fast(data: bytes) -> np.ndarray:
    return decode(data, mode="fast").pixels


@pytest.mark.parametrize("is_interlaced", [False, True])
def test_png_is_rounded(is_interlaced: bool) -> None:
    x = values(3)
    data = png(x, 2, is_interlaced=is_interlaced)
    np.testing.assert_array_equal(fast(data), levels(x))
    exact = decode(data).pixels
    np.testing.assert_array_equal(exact, np.asarray(Image.open(BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(exact, x >> 8)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8))
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return np.asarray(white)


def test_alpha_is_rounded_too() -> None:
    x = values(4)
    expected = on_white(levels(x[..., :3]), levels(x[..., 3]))
    np.testing.assert_array_equal(fast(png(x, 6)), expected)
    np.testing.assert_array_equal(fast(tiff(x, extra=2)), expected)
    grey = values(2)
    expected = on_white(np.repeat(levels(grey[..., :1]), 3, axis=2), levels(grey[..., 1]))
    np.testing.assert_array_equal(fast(png(grey, 4)), expected)


def test_a_transparent_colour_of_sixteen_bits_lies_on_white() -> None:
    x = values(3)
    x[7, 9] = x[20, 3] = (1000, 2000, 3001)
    x[5, 5] = (1000, 2000, 3000)  # the same high bytes
    expected = levels(x)
    expected[7, 9] = expected[20, 3] = 255
    data = png(x, 2, transparent=struct.pack(">HHH", 1000, 2000, 3001))
    np.testing.assert_array_equal(fast(data), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_tiff_is_rounded(order: str, is_packed: bool) -> None:
    x = values(3)
    data = tiff(x, order=order, is_packed=is_packed)
    np.testing.assert_array_equal(fast(data), levels(x))
    np.testing.assert_array_equal(decode(data).pixels, x >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_a_tiff(order: str) -> None:
    x = values(3)
    plain = tiff(x, order=order, has_planes=True)
    np.testing.assert_array_equal(fast(plain), levels(x))
    # Pillow alone reads such planes as of 8 bits
    np.testing.assert_array_equal(decode(plain).pixels, x >> 8)
    packed = tiff(x, order=order, has_planes=True, is_packed=True)
    np.testing.assert_array_equal(fast(packed), x >> 8)


def test_a_turned_tiff_is_upright() -> None:
    x = values(3)
    result = decode(tiff(x, orientation=6), mode="fast")
    np.testing.assert_array_equal(result.pixels, np.rot90(levels(x), -1))
    assert (result.width, result.height) == (HEIGHT, WIDTH)


def test_cmyk_is_rounded() -> None:
    x = values(4)
    image = Image.frombytes("CMYK", (WIDTH, HEIGHT), levels(x).astype(np.uint8).tobytes())
    np.testing.assert_array_equal(fast(tiff(x, photometric=5)), np.asarray(image.convert("RGB")))


def test_a_ppm_is_rounded_by_pillow() -> None:
    x = values(3)
    data = f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + x.astype(">u2").tobytes()
    np.testing.assert_array_equal(fast(data), levels(x))
    np.testing.assert_array_equal(decode(data).pixels, levels(x))


def test_twice_the_time_and_memory_are_counted() -> None:
    data, memory_bytes = png(values(3), 2), 12 * WIDTH * HEIGHT
    limits = Limits(max_memory_bytes=memory_bytes)
    assert decode(data, limits=limits).pixels.shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(DecodeError, match="MiB to decode"):
        decode(data, limits=limits, mode="fast")
    fast_limits = Limits(max_memory_bytes=2 * memory_bytes)
    assert decode(data, limits=fast_limits, mode="fast").pixels.shape == (HEIGHT, WIDTH, 3)


def test_a_file_that_is_cut_off_is_refused() -> None:
    for data in (png(values(3), 2), tiff(values(3)), tiff(values(3), is_packed=True)):
        with pytest.raises(DecodeError, match="is not a whole image"):
            decode(data[: len(data) // 2], mode="fast")
