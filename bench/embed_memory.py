"""Peak memory of `lraee embed` by the number of photos: it must not grow with them.

    python -m bench.embed_memory --count 2000 --count 20000

The photos are hard links to a few JPEG files of about 60 KB, 1,000 a folder. Each run is a process
of its own; a second one resumes, which reads every row of the listing and no photo.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from bench.environment import describe

_KINDS, _PER_FOLDER, _LINKS = 16, 1000, 30_000


def photo(seed: int) -> bytes:
    """A JPEG of 512 x 384 and about 60 KB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, np.int16) + rng.integers(-12, 13, (384, 512, 3))
    buffer = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=83)
    return buffer.getvalue()


def library(root: Path, count: int) -> int:
    """`count` photos below root; returns the mean of their bytes."""
    kinds = max(_KINDS, -(-count // _LINKS))  # file systems limit the links to one file
    (root / ".kinds").mkdir(parents=True)
    for k in range(kinds):
        (root / ".kinds" / f"{k}.jpg").write_bytes(photo(k))
    for i in range(count):
        folder = root / f"{i // _PER_FOLDER:05d}"
        folder.mkdir(exist_ok=True)
        os.link(root / ".kinds" / f"{i % kinds}.jpg", folder / f"{i % _PER_FOLDER:05d}.jpg")
    return sum(path.stat().st_size for path in (root / ".kinds").iterdir()) // kinds


def measure(photos: Path, out: Path, options: list[str]) -> dict[str, float]:
    """One `lraee embed` in a child process: seconds, CPU, peak MB, and what it says it did."""
    command = [sys.executable, "-m", "lraee", "embed", str(photos), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--no-progress", "--json", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    figures = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"embed_memory: the command must end with 0, got status {status}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "embedded": figures["embedded"],
        "resumed": figures["resumed"],
    }


def main(
    count: Annotated[list[int] | None, typer.Option(min=1, help="Photos; again for more.")] = None,
    model: Annotated[str, typer.Option(help="Of the zoo.")] = "lraee-tiny",
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Measure the peak memory of embedding and of resuming for each count."""
    header = describe()
    typer.echo("  ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for photos in count or [2_000, 20_000]:
        with tempfile.TemporaryDirectory() as folder:
            bytes_each = library(Path(folder) / "photos", photos)
            for form in ("embed", "resume"):
                row = measure(Path(folder) / "photos", Path(folder) / "out", ["--model", model])
                rows.append({"count": photos, "bytes_each": bytes_each, "form": form, **row})
                typer.echo(
                    f"{photos:8d} photos of {bytes_each} bytes  {form:<7} "
                    f"{row['peak_mb']:8.0f} MB  {row['seconds']:8.1f} s"
                    f"  {row['cpu_seconds']:8.1f} s of CPU"
                )
    if out is not None:
        out.write_text(json.dumps({"schema": "lraee.embed_memory/1", **header, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
