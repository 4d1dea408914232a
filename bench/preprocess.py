"""Preprocessing on one thread: its stages, what decoding costs, and what its shortcuts change.

python -m bench.preprocess stages            milliseconds a photo, distance from open_clip's
python -m bench.preprocess costs             nanoseconds a pixel of each format
python -m bench.preprocess levels            what uint8 into the tower would save
python -m bench.preprocess agreement ZIP     the same nearest photos: fast and INT8
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from open_clip.transform import image_transform
from PIL import Image

from bench.preprocess_agreement import agreement
from bench.preprocess_costs import costs
from bench.preprocess_levels import levels
from lraee.data import decoding, resize
from lraee.data.preprocess import Preprocess, from_transform

SIZES = ((500, 375), (4000, 3000))
NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def jpegs(size: tuple[int, int]) -> list[bytes]:
    """The photos of scikit-image at this size, with noise of a camera, JPEG at quality 90."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations, "pip install scikit-image"
    folder = Path(spec.submodule_search_locations[0]) / "data"
    rng = np.random.default_rng(0)
    files = []
    for name in NAMES:
        photo = Image.open(folder / name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 2, (size[1], size[0], 1))
        noisy = np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8)
        file = BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def timed(calls: dict[str, Callable[[bytes], object]], files: list[bytes], rounds: int) -> None:
    """Print the median and the 20th and 80th percentile of each call, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for data in files:
        for call in calls.values():
            call(data)
    for index in range(rounds):
        data = files[index % len(files)]
        for name, call in calls.items():
            start = time.perf_counter()
            call(data)
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        print(f"  {name:<28}| {statistics.median(values):8.2f} ms ({low:.2f}-{high:.2f})")


def resized(preprocess: Preprocess, decoded: decoding.Decoded, data: bytes) -> torch.Tensor:
    """The stage after decoding; the same picture each time, whatever the file."""
    return preprocess.image(decoded)


def distance(a: torch.Tensor, b: torch.Tensor) -> str:
    """The largest difference of levels, and PSNR."""
    error = (a.int() - b.int()).abs().double()
    square = float((error**2).mean())
    psnr = math.inf if square == 0 else 10 * math.log10(255**2 / square)
    return f"largest {int(error.max())}, PSNR {psnr:.1f} dB"


def stages(
    rounds: Annotated[int, typer.Argument(min=2, help="Times each call is made.")] = 40,
) -> None:
    """Milliseconds per photo of exact, fast and open_clip's own transform, and of each stage.

    In interleaved rounds of one process; then the distance of the pixels from open_clip's: largest
    difference, and PSNR. Photos are those of scikit-image, as JPEG of 500 x 375 and 4000 x 3000.
    """
    torch.set_num_threads(1)
    transform = image_transform(224, False, MEAN, STD)
    exact, fast = from_transform(transform), from_transform(transform, mode="fast")
    print(f"decoder {decoding.decoder_name()}, resize {resize.implementation()}, one thread")
    for size in SIZES:
        files = jpegs(size)
        print(f"{size[0]} x {size[1]}, {sum(map(len, files)) / len(files) / 1e3:.0f} kB")
        upright = exact.decode(files[0]), fast.decode(files[0])
        calls: dict[str, Callable[[bytes], object]] = {
            "open_clip (Pillow)": lambda data: transform(Image.open(BytesIO(data))),
            "exact": exact,
            "fast": fast,
            "exact: decode": exact.decode,
            "exact: resize and normalise": partial(resized, exact, upright[0]),
            "fast: decode": fast.decode,
            "fast: resize and normalise": partial(resized, fast, upright[1]),
        }
        timed(calls, files, rounds)
        identity = np.repeat(np.arange(256, dtype=np.float32)[None], 3, axis=0)
        unscaled = [replace(p, table=identity) for p in (exact, fast)]
        for data, name in zip(files, NAMES, strict=True):
            expected = transform(Image.open(BytesIO(data)))
            same = torch.equal(exact(data), expected)
            wide, quick = (p(data) for p in unscaled)
            print(f"  {name:<28}| exact equal {same}; fast {distance(wide, quick)}")


app = typer.Typer(add_completion=False)
for each in (stages, costs, levels, agreement):
    app.command()(each)

if __name__ == "__main__":
    app()
