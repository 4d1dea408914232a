"""Formats by content, sizes, orientation and frame counts, each from the first bytes alone."""

import struct
from io import BytesIO

import pytest
from PIL import Image

from lraee.data.headers import (
    HeaderError,
    count_frames,
    exif_orientation,
    format_of,
    read_jpeg,
    size_of,
)
from tests.image_files import encoded, photo


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_format_and_size_are_read_from_the_content(form: str) -> None:
    data = encoded(1, form, (51, 34))
    assert format_of(data) == form
    if form not in ("JPEG", "TIFF", "AVIF"):
        assert size_of(data, form) == (51, 34)  # type: ignore[arg-type]


def test_each_kind_of_webp_has_its_size() -> None:
    for options in ({"lossless": True}, {"quality": 50}, {"exif": b"Exif\x00\x00II*\x00"}):
        file = BytesIO()
        photo(1, (51, 34)).save(file, "WEBP", **options)
        assert size_of(file.getvalue(), "WEBP") == (51, 34)


def test_what_is_no_picture_has_no_format() -> None:
    for data in (
        b"",
        b"hello",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"<svg/>",
        b"RIFF....WAVE",
        b"\xff\xd8",
    ):
        assert format_of(data) is None
    assert format_of(b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic") == "HEIF"
    assert format_of(b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avif") == "AVIF"


def test_a_jpeg_header_holds_what_decoding_needs() -> None:
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    profile = bytes(range(256)) * 600  # more than a segment holds
    photo(1, (51, 34)).save(file, "JPEG", exif=exif, icc_profile=profile, progressive=True)
    header = read_jpeg(file.getvalue())
    assert (header.width, header.height, header.components, header.bits) == (51, 34, 3, 8)
    assert header.is_progressive and 2 < header.scans < 20
    assert header.orientation == 6 and header.icc == profile


def test_a_jpeg_without_a_frame_or_with_a_cut_segment_is_refused() -> None:
    with pytest.raises(HeaderError, match="there is no JPEG frame header"):
        read_jpeg(b"\xff\xd8\xff\xd9")
    with pytest.raises(HeaderError, match="segment is cut short"):
        read_jpeg(b"\xff\xd8\xff\xe1\xff\xff" + bytes(20))
    with pytest.raises(HeaderError, match="frame header is cut short"):
        read_jpeg(b"\xff\xd8\xff\xc0\x00\x04\x08\x00" + bytes(20))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_either_byte_order(order: str) -> None:
    mark = b"II" if order == "<" else b"MM"

    def exif(tag: int, kind: int, value: int) -> bytes:
        entry = struct.pack(order + "HHIHH", tag, kind, 1, value, 0)
        return mark + struct.pack(order + "HIH", 42, 8, 1) + entry

    assert [exif_orientation(exif(0x0112, 3, value)) for value in range(10)] == [
        1, 1, 2, 3, 4, 5, 6, 7, 8, 1,
    ]  # fmt: skip
    assert exif_orientation(exif(0x0113, 3, 6)) == 1
    assert exif_orientation(exif(0x0112, 2, 6)) == 1
    assert exif_orientation(mark + struct.pack(order + "HI", 42, 1 << 31)) == 1
    assert exif_orientation(exif(0x0112, 3, 6)[:-6]) == 1
    assert exif_orientation(b"") == 1


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_frames_are_counted_up_to_a_limit(form: str) -> None:
    file = BytesIO()
    frames = [photo(i, (20, 20)) for i in range(5)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    assert count_frames(file.getvalue(), form, 100) == 5  # type: ignore[arg-type]
    assert count_frames(encoded(1, form), form, 100) == 1  # type: ignore[arg-type]
    assert count_frames(file.getvalue(), form, 2) > 2  # type: ignore[arg-type]


def test_a_loop_of_tiff_directories_ends_at_the_limit() -> None:
    looped = b"II*\x00" + struct.pack("<I", 8) + struct.pack("<HI", 0, 8)
    assert count_frames(looped, "TIFF", 50) == 51
