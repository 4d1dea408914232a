"""Nanoseconds per pixel that decoding takes: what `_NANOSECONDS` of lraee/data/decoding.py is from.

    python -m bench.preprocess costs

The CPU time of this thread, the least of several runs, of the worse of two pictures: a photo with
the noise of a camera, and noise alone, which no format compresses. The constants are about three
times that: they bound what a slower machine takes, in order to refuse a file, not to predict.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import typer
from PIL import Image, ImageFile

from bench.environment import describe
from lraee.data import decoding

SIDE = 1024
PIXELS = SIDE * SIDE
ImageFile.MAXBLOCK = 16 * PIXELS  # a progressive JPEG is written in one block


def pictures() -> dict[str, Image.Image]:
    """A photo with noise, and noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 4, smooth.shape).astype(np.int16)
    return {
        "photo": Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)),
        "noise": Image.fromarray(rng.integers(0, 256, smooth.shape, dtype=np.uint8)),
    }


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The file."""
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep_ppm(image: Image.Image) -> bytes:
    """A PPM of 16 bits."""
    values = np.asarray(image).astype(">u2") * np.uint16(257)
    return b"P6 %d %d 65535\n" % image.size + values.astype(">u2").tobytes()


def kinds() -> Iterator[tuple[str, Callable[[Image.Image], bytes]]]:
    """What is decoded, by name."""
    yield "JPEG", lambda image: saved(image, "JPEG", quality=95, subsampling=0)
    yield (
        "JPEG progressive",
        lambda image: saved(image, "JPEG", quality=95, subsampling=0, progressive=True),
    )
    yield "PNG", lambda image: saved(image, "PNG")
    yield "WEBP", lambda image: saved(image, "WEBP", quality=95)
    yield "WEBP lossless", lambda image: saved(image, "WEBP", lossless=True)
    yield "GIF", lambda image: saved(image, "GIF")
    yield "BMP", lambda image: saved(image, "BMP")
    yield "TIFF", lambda image: saved(image, "TIFF")
    for name, code in (
        ("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("jpeg", "jpeg"),
    ):  # fmt: skip
        yield f"TIFF {name}", partial(saved, form="TIFF", compression=code)
    yield "PPM", lambda image: saved(image, "PPM")
    yield "PPM 16 bits", deep_ppm
    yield "AVIF", lambda image: saved(image, "AVIF", quality=90, speed=8)
    if decoding._register_heif():
        yield "HEIF", lambda image: saved(image, "HEIF", quality=90)


def cpu_ns(data: bytes, runs: int) -> float:
    """The least CPU time of `runs`, all threads of the decoder, per pixel."""
    least = float("inf")
    limits = decoding.Limits(max_seconds=1e9)
    for _ in range(runs):
        start = time.process_time_ns()
        decoding.decode(data, limits=limits)
        least = min(least, time.process_time_ns() - start)
    return least / PIXELS


def costs(runs: int = 7) -> None:
    """Nanoseconds of CPU per pixel, by format."""
    typer.echo("  ".join(f"{key} {value}" for key, value in describe().items()))
    typer.echo(f"decoder {decoding.decoder_name()}; {SIDE} x {SIDE}, the least of {runs} runs")
    shown = pictures()
    for name, encode in kinds():
        by_picture = {picture: cpu_ns(encode(image), runs) for picture, image in shown.items()}
        each = "  ".join(f"{picture} {ns:7.1f}" for picture, ns in by_picture.items())
        typer.echo(f"  {name:<18}{each}  worst {max(by_picture.values()):7.1f} ns a pixel")
