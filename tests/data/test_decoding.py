"""Decoding: what a viewer shows, at the size it was asked for, or one line that says why not."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from lraee.data import decoding, modes
from lraee.data.decoding import DecodeError, Limits, decode
from tests.image_files import encoded, photo


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode(data).pixels


def same(actual: np.ndarray, expected: np.ndarray | Image.Image) -> None:
    np.testing.assert_array_equal(actual, np.asarray(expected))


needs_simplejpeg = pytest.mark.skipif(
    decoding.decoder_name() != "simplejpeg", reason="needs simplejpeg (extra embed)"
)


# Plain pictures


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_a_plain_picture_is_what_pillow_shows(form: str) -> None:
    data = encoded(3, form, (45, 31))
    result = decode(data)
    same(result.pixels, Image.open(BytesIO(data)).convert("RGB"))
    assert (result.width, result.height) == (45, 31)
    assert result.pixels.flags.c_contiguous and result.pixels.flags.writeable


@needs_simplejpeg
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_both_jpeg_decoders_give_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        saved(photo(seed, size), "JPEG", quality=quality, subsampling=subsampling, progressive=late)
        for seed, size in enumerate([(200, 150), (333, 251), (64, 500)])
        for quality in (50, 95)
        for subsampling in (0, 1, 2)
        for late in (False, True)
    ]
    cases.append(saved(photo(9, (120, 90)).convert("L"), "JPEG"))
    by_simplejpeg = [decode(data, target=20, mode=mode).pixels for data in cases]  # type: ignore[arg-type]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert decoding.decoder_name() == "pillow"
    for data, expected in zip(cases, by_simplejpeg, strict=True):
        same(decode(data, target=20, mode=mode).pixels, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "height"),
    [(224, 600), (150, 300), (151, 600), (75, 150), (37, 75), (1, 75), ((150, 100), 300)],
)
def test_fast_decoding_keeps_twice_the_target(target: int | tuple[int, int], height: int) -> None:
    data = saved(photo(1, (801, 600)), "JPEG", quality=95)
    result = decode(data, target=target, mode="fast")
    assert result.pixels.shape == (height, -(-801 * height // 600), 3)
    assert (result.width, result.height) == (801, 600)
    assert decode(data, target=target).pixels.shape == (600, 801, 3)
    whole = Image.fromarray(decode(data).pixels).resize(result.pixels.shape[1::-1], Image.BOX)
    assert np.abs(np.asarray(whole).astype(int) - result.pixels).mean() < 3


# Orientation


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(2, (48, 32)), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    result = decode(data)
    same(result.pixels, expected)
    assert (result.width, result.height) == expected.size == ((48, 32), (32, 48))[orientation > 4]


def test_a_target_is_meant_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(photo(2, (800, 160)), "JPEG", exif=exif)
    result = decode(data, target=(200, 40), mode="fast")  # upright 800 high and 160 wide
    assert result.pixels.shape == (400, 80, 3) and (result.width, result.height) == (160, 800)


# Depths and modes

GREY = np.asarray(photo(4, (40, 30)).convert("L"))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_257_and_rounded(form: str) -> None:
    same(pixels(saved(Image.fromarray(GREY.astype(np.uint16) * 257), form))[..., 1], GREY)
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    levels = (values.astype(int) * 255 + 32767) // 65535
    same(pixels(saved(Image.fromarray(values), form))[..., 0], levels)


def test_a_negative_of_sixteen_bits_is_shown_as_one() -> None:
    file = Image.fromarray((255 - GREY.astype(np.uint16)) * 257)
    same(pixels(saved(file, "TIFF", tiffinfo={262: 0}))[..., 0], GREY)


def test_floats_of_0_to_1_are_scaled_by_255_and_others_by_their_range() -> None:
    same(pixels(saved(Image.fromarray(GREY / np.float32(255)), "TIFF"))[..., 0], GREY)
    spread = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)
    same(pixels(saved(Image.fromarray(spread), "TIFF"))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_floats_that_stand_for_no_grey_are_refused(value: float) -> None:
    data = saved(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="no grey stands for"):
        decode(data)


def test_integers_of_32_bits_are_scaled_by_their_range() -> None:
    spread = (np.arange(256, dtype=np.int32) * 1000 - 50_000).reshape(16, 16)
    same(pixels(saved(Image.fromarray(spread), "TIFF"))[..., 0].ravel(), np.arange(256))
    deep = Image.fromarray((GREY.astype(np.uint16) * 257).astype(np.int32))
    header = b"P5\n40 30\n65535\n"
    same(pixels(header + np.asarray(deep).astype(">u2").tobytes())[..., 0], GREY)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(form: str) -> None:
    colors = np.dstack([np.asarray(photo(5, (16, 16))), np.zeros((16, 16), np.uint8)])
    colors[:8, :, 3] = 255
    colors[0, 0, 3] = 128
    result = pixels(
        saved(Image.fromarray(colors), form, **{"lossless": True} if form == "WEBP" else {})
    )
    assert (result[8:] == 255).all()
    same(result[1:8], colors[1:8, :, :3])
    assert (
        abs(result[0, 0].astype(int) - (colors[0, 0, :3] * 128.0 + 255 * 127) / 255).max() <= 0.51
    )


def test_transparent_palettes_and_greys_lie_on_white() -> None:
    palette = photo(5, (16, 16)).quantize(8)
    index = palette.getpixel((3, 3))
    for form in ("PNG", "GIF"):
        result = pixels(saved(palette, form, transparency=index))
        hidden = np.asarray(palette) == index
        assert hidden.any() and (result[hidden] == 255).all()
        same(result[~hidden], np.asarray(palette.convert("RGB"))[~hidden])
    grey = Image.new("LA", (4, 4), (10, 0))
    assert (pixels(saved(grey, "PNG")) == 255).all()


def test_cmyk_is_not_a_negative() -> None:
    red = Image.new("RGB", (32, 32), (220, 30, 40)).convert("CMYK")
    for form in ("JPEG", "TIFF"):
        result = pixels(saved(red, form))
        assert np.abs(result.astype(int) - (220, 30, 40)).max() < 12, form
    # Adobe's files hold the inverse; Pillow writes one, with the marker that says so.
    assert b"Adobe" in saved(red, "JPEG")


def test_a_profile_of_cmyk_is_used_and_a_broken_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    red = Image.new("CMYK", (32, 32), (0, 200, 200, 20))
    broken = bytearray(512)
    broken[16:20] = b"CMYK"
    modes_converted = []

    def converted(image: Image.Image, *_: object, **__: object) -> Image.Image:
        modes_converted.append(image.mode)
        return Image.new("RGB", image.size, (1, 2, 3))

    for form in ("JPEG", "TIFF"):
        plain = pixels(saved(red, form))
        same(pixels(saved(red, form, icc_profile=bytes(broken))), plain)
        with monkeypatch.context() as patch:
            patch.setattr(ImageCms, "ImageCmsProfile", lambda file: file)
            patch.setattr(ImageCms, "profileToProfile", converted)
            result = pixels(saved(red, form, icc_profile=bytes(broken)))
            assert modes_converted.pop() == "CMYK" and (result == (1, 2, 3)).all()
            patch.setattr(modes, "_MAX_PROFILE_BYTES", 256)
            same(pixels(saved(red, form, icc_profile=bytes(broken))), plain)


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all(), form
        with pytest.raises(DecodeError, match="has more than 2 frames"):
            decode(data, limits=Limits(max_frames=2))


def test_heic_is_decoded_or_names_what_is_missing() -> None:
    try:
        import pillow_heif
    except ImportError:
        data = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
        with pytest.raises(DecodeError, match="pip install pillow-heif"):
            decode(data)
        return
    file = BytesIO()
    pillow_heif.from_pillow(photo(1, (64, 48))).save(file, quality=95, chroma=444)
    result = pixels(file.getvalue())
    assert np.abs(result.astype(int) - np.asarray(photo(1, (64, 48)))).mean() < 4


# Limits

CASES = {
    "bytes": (Limits(max_bytes=100), encoded(1), r"has \d+ bytes, more than 100"),
    "pixels": (Limits(max_pixels=5000), encoded(1), "has 80 x 64 pixels, more than 5000"),
    "aspect": (Limits(max_aspect=1.2), encoded(1), "is 80 x 64, longer than 1.2 : 1"),
    "memory": (Limits(max_memory_bytes=1 << 10), encoded(1, "PNG"), "would take 0 MiB to decode"),
    "seconds": (
        Limits(max_seconds=1e-5),
        encoded(1),
        "would take 0.0 s to decode",
    ),
    "cut": (Limits(), encoded(1)[:700], "is not a whole image: "),
    "empty": (Limits(), b"", "is not a whole image: is empty"),
    "other": (Limits(), b"%PDF-1.7", "is not a whole image: begins with %PDF-1.7"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_limit_has_its_reason(name: str) -> None:
    limits, data, reason = CASES[name]
    with pytest.raises(DecodeError, match=reason) as caught:
        decode(data, limits=limits)
    assert "\n" not in str(caught.value)


def test_time_is_checked_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 30.0])
    monkeypatch.setattr(decoding.time, "monotonic", lambda: next(times))
    with pytest.raises(DecodeError, match="took 30.0 s, more than 20"):
        decode(encoded(1, "PNG"))


def test_a_ppm_that_pillow_decodes_in_python_counts_as_slow() -> None:
    header, limits = b"P6 100 100 %d\n", Limits(max_seconds=0.01)
    assert decode(header % 255 + bytes(30_000), limits=limits).pixels.shape == (100, 100, 3)
    with pytest.raises(DecodeError, match="would take 0.0 s to decode"):
        decode(header % 65535 + bytes(60_000), limits=limits)


def test_many_scans_of_a_progressive_jpeg_are_refused() -> None:
    data = saved(photo(1), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    repeated = data[:last] + data[last:-2] * 150 + data[-2:]
    with pytest.raises(DecodeError, match=r"has 1\d\d scans, more than 100"):
        decode(repeated)


def test_a_tile_larger_than_its_picture_counts() -> None:
    sides = [(256, 4), (257, 4), (322, 60_000), (323, 60_000)]
    others = [(258, 8), (259, 1), (262, 1), (277, 1), (324, 8), (325, 16)]
    entries = sorted(sides + others)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + bytes(64)
    with pytest.raises(DecodeError, match="would take 4[0-9]+ MiB to decode"):
        decode(data)


def test_a_warning_of_libjpeg_is_pillows_to_judge() -> None:
    """Bytes after the picture: simplejpeg calls it an error, every viewer shows the picture."""
    data = encoded(1)
    at = data.rindex(b"\xff\xd9")
    same(pixels(data[:at] + b"\x00\x00\x00" + data[at:]), Image.open(BytesIO(data)).convert("RGB"))
