"""Small real models that ship with the package, weights included.

    model, preprocess, tokenizer = lraee.zoo.load("lraee-tiny")

The same model through open_clip, for code that already calls it:

    weights = lraee.zoo.register("lraee-tiny")  # makes the name known, verifies the weights
    model, _, preprocess = open_clip.create_model_and_transforms("lraee-tiny", pretrained=weights)
    tokenizer = open_clip.get_tokenizer("lraee-tiny")

open_clip's own preprocessing resizes the shorter side to 56 and crops nothing from a square photo;
`load` returns the one that the model was measured with (shorter side 64, centre crop 56). The card
beside the weights has the figures.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL.Image import Image
from torch import nn
from torchvision import transforms

from lraee.towers import hub
from lraee.towers.hub import Preprocess, Tokenizer


@dataclass(frozen=True)
class Entry:
    """One model: `resize` is the photo's shorter side before the centre crop `crop`, in pixels."""

    sha256: str
    resize: int
    crop: int

    def preprocess(self, *, has_margin: bool = False) -> Preprocess:
        """Photo -> float32 [3, crop, crop]: resize (bicubic), centre crop, CLIP's mean and std.

        With `has_margin` the square of the resized photo, [3, resize, resize]: the same pixels with
        what lies around them.
        """
        side = self.resize if has_margin else self.crop
        steps: Preprocess = transforms.Compose(
            [
                transforms.Resize(self.resize, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                _convert_to_rgb,
                transforms.ToTensor(),
                transforms.Normalize(hub.MEAN, hub.STD),
            ]
        )
        return steps


_ENTRIES = {
    "lraee-tiny": Entry(
        sha256="bcac6005d30551e47fb0976c60781c6d5952e5944b28961dfb78bcfc7771bcbb",
        resize=64,
        crop=56,
    ),
}


def names() -> tuple[str, ...]:
    """Every name that `load` and `register` take."""
    return tuple(_ENTRIES)


def directory(name: str) -> Path:
    """Where the config, the weights and the model card (README.md) of one model lie."""
    _entry(name)
    return Path(__file__).parent / name


def register(name: str) -> str:
    """Makes `name` a model of open_clip in this process; returns its verified weights file.

    Raises: ValueError on an unknown name, RuntimeError on a missing or changed weights file.
    """
    entry = _entry(name)
    weights = directory(name) / hub.WEIGHTS_NAME
    if name not in hub.model_names():
        hub.add_config(directory(name) / f"{name}.json")
    _verify(name, weights, entry.sha256)
    return str(weights)


def class_names(name: str) -> tuple[str, ...]:
    """Words that the model's text tower was trained to know, in label order."""
    return tuple(json.loads((directory(name) / "classes.json").read_text(encoding="utf-8")))


def load(name: str) -> tuple[nn.Module, Preprocess, Tokenizer]:
    """The model (eval, float32, CPU), its preprocessing and its tokenizer.

    Args:
      name: one of `names()`.
    Returns: open_clip's CLIP; photo -> float32 [3, H, W]; list of texts -> int64 [n, context].
    Raises: ValueError on an unknown name, RuntimeError on a missing or changed weights file.
    """
    weights = register(name)
    return hub.create_model(name, weights), _ENTRIES[name].preprocess(), hub.tokenizer(name)


def preprocess_with_margin(name: str) -> Preprocess:
    """As `load`'s preprocessing, with the margin that its centre crop cuts off."""
    return _entry(name).preprocess(has_margin=True)


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise ValueError(f"zoo: name must be one of {', '.join(_ENTRIES)}, got {name!r}")
    return _ENTRIES[name]


def _convert_to_rgb(image: Image) -> Image:
    return image.convert("RGB")


def _verify(name: str, weights: Path, sha256: str) -> None:
    if not weights.is_file():
        raise RuntimeError(
            f"zoo: {name} must have its weights at {weights}, got no such file; install lraee again"
        )
    actual = _sha256(weights, weights.stat().st_mtime_ns, weights.stat().st_size)
    if actual != sha256:
        raise RuntimeError(
            f"zoo: {weights} must have sha256 {sha256}, got {actual}: "
            "the file was changed or cut; install lraee again"
        )


@cache
def _sha256(path: Path, mtime_ns: int, size_bytes: int) -> str:
    """The file's hash, read again only when its time stamp or size moved."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
