"""Photos per second from files to Parquet: `lraee embed` beside open_clip's Pillow transform.

    python -m bench.embed --model ViT-B-32 --width 4000 --height 3000 --count 32 --rounds 5

All forms run the same INT8 tower on the same files, in interleaved rounds of one process:
`pillow loop` decodes and encodes in turn, as scripts around open_clip do; `pillow pool` has its
decoding in the threads of `lraee embed`; `exact` and `fast` are `lraee embed`. Random weights where
no `--pretrained` is given: time does not depend on them.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from bench.environment import describe
from bench.preprocess import jpegs
from lraee.data.sources import Limits
from lraee.measurement.timing import timed_rounds
from lraee.serving.embed import Prepared, run
from lraee.serving.embed_model import Choice, PhotoModel
from lraee.serving.listing import open_listing
from lraee.serving.output import Output
from lraee.zoo.opening import open_model


class PillowModel(PhotoModel):
    """The same tower behind the transform that open_clip gives."""

    def prepare(self, data: bytes) -> Prepared:
        """Pixels float32 [3, H, W], by Pillow and torchvision."""
        image = Image.open(BytesIO(data))
        return Prepared(self._opened.preprocess(image).numpy(), *image.size)


def loop(model: PillowModel, photos: Path, batch: int) -> None:
    """Decode a batch, then encode it; keep the embeddings."""
    paths, kept = sorted(photos.iterdir()), []
    for start in range(0, len(paths), batch):
        rows = [model.prepare(path.read_bytes()) for path in paths[start : start + batch]]
        kept.append(model.encode(rows)[0])
    np.save(photos.parent / "loop.npy", np.concatenate(kept))


def piped(model: PhotoModel, photos: Path, batch: int, workers: int) -> None:
    """All of `lraee embed` but opening the model."""
    with tempfile.TemporaryDirectory(dir=photos.parent) as out, Output(Path(out)) as output:
        listing = open_listing([str(photos)], Limits())
        run(listing, model, output, batch=batch, workers=workers, progress=False)


def rounds(forms: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of each form: one warm-up, then `count` rounds in rotating order."""
    for form in forms.values():
        form()
    return timed_rounds(forms, count)


def main(
    model: str = "ViT-B-32",
    pretrained: str | None = None,
    width: int = 4000,
    height: int = 3000,
    count: Annotated[int, typer.Option(min=1, help="Photos.")] = 32,
    batch: int = 32,
    workers: Annotated[int, typer.Option(min=0, help="Decode threads; 0: one per CPU.")] = 0,
    repeat: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print photos per second of each form, and how many times faster than the Pillow loop."""
    header = describe()
    typer.echo("  ".join(f"{key} {value}" for key, value in header.items()))
    choice = Choice(model, "bench", pretrained)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        files = jpegs((width, height))
        for i in range(count):
            (photos / f"{i:05d}.jpg").write_bytes(files[i % len(files)])
        opened = [open_model(model, pretrained, may_be_random=True) for _ in range(3)]
        pillow, fast = PillowModel(choice, opened[0]), PhotoModel(choice, opened[1])
        exact = PhotoModel(Choice(model, "bench", pretrained, mode="exact"), opened[2])
        seconds = rounds(
            {
                "pillow loop": lambda: loop(pillow, photos, batch),
                "pillow pool": lambda: piped(pillow, photos, batch, workers),
                "exact": lambda: piped(exact, photos, batch, workers),
                "fast": lambda: piped(fast, photos, batch, workers),
            },
            repeat,
        )
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        pairs = zip(seconds["pillow loop"], times, strict=True)
        ratio = statistics.median(base / own for base, own in pairs)
        rows[name] = {"photos_per_s": count / statistics.median(times), "ratio": ratio}
        typer.echo(f"{name:<12} {rows[name]['photos_per_s']:8.1f} photos/s  {ratio:5.2f} x")
    if out is not None:
        out.write_text(json.dumps({"schema": "lraee.embed_bench/1", **header, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
