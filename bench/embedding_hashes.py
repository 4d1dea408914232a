"""Hashes of embeddings by every scheme: equal before and after a change that keeps every bit.

python -m bench.embedding_hashes PHOTOS [--exits EXITS ...]
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

import lraee
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.zoo.opening import open_model

SCHEMES = ("int8", "int8-patches", "paper")


def digest(embeddings: Tensor) -> str:
    """First 16 digits of the sha256 of float32 values."""
    numbers = embeddings.detach().float().contiguous().numpy().tobytes()
    return hashlib.sha256(numbers).hexdigest()[:16]


def hashes(
    model: nn.Module, images: Tensor, exits: list[Path], *, has_float: bool = True
) -> dict[str, str]:
    """One digest per scheme, per saved exits, and of the float model."""
    encode = {"float": model} if has_float else {}
    encode |= {scheme: lraee.accelerate(model, scheme=scheme) for scheme in SCHEMES}
    encode |= {f"exits {path.name}": lraee.accelerate(model, exits=path) for path in exits}
    with torch.inference_mode():
        return {name: digest(cast(Any, each).encode_image(images)) for name, each in encode.items()}


def main(
    photos: Path,
    exits: Annotated[list[Path] | None, typer.Option(help="Saved exits of lraee-tiny.")] = None,
    count: int = 256,
) -> None:
    """Print the digests of lraee-tiny on photos, and of a ViT-B/32 with seeded weights."""
    opened = open_model("lraee-tiny")
    batches = list(PhotoImages(Photos(photos, limit=count), opened.preprocess, progress=False))
    for name, value in hashes(opened.model, torch.cat(batches), exits or []).items():
        typer.echo(f"lraee-tiny {name:<24}{value}")
    torch.manual_seed(0)
    large = open_model("ViT-B-32", may_be_random=True).model
    images = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for name, value in hashes(large, images, [], has_float=False).items():
        typer.echo(f"ViT-B-32 {name:<26}{value}")


if __name__ == "__main__":
    typer.run(main)
