"""The accelerated form of a float model that a command was asked for: quantized now, or saved."""

import os
from typing import TypeVar

from torch import nn

from lraee.exits.bundle import Exits
from lraee.layers.scheme import Scheme
from lraee.model.accelerate import accelerate
from lraee.model.checkpoint import load

Model = TypeVar("Model", bound=nn.Module)
Folder = str | os.PathLike[str]


def accelerated(
    model: Model,
    *,
    scheme: str | Scheme | None = None,
    exits: Exits | Folder | None = None,
    text: str | None = None,
    checkpoint: Folder | None = None,
) -> Model:
    """The model in int8; it is changed, or stays as it is where a checkpoint is read.

    Args:
      model: float.
      scheme: as in accelerate; None: that of the exits, else "int8".
      exits: from lraee.calibrate, or their folder.
      text: as in accelerate.
      checkpoint: where lraee.save wrote; it has a scheme and a text tower of its own.
    Raises: as accelerate and load; ValueError on a scheme or text beside a checkpoint.
    """
    if exits is not None and not isinstance(exits, Exits):
        exits = Exits.load(exits)
    if checkpoint is None:
        scheme = scheme or (exits.scheme if exits else "int8")
        return accelerate(model, scheme=scheme, exits=exits, text=text, inplace=True)
    require_one(scheme, checkpoint)
    require_one(text, checkpoint, "text")
    return load(checkpoint, model, exits=exits)


def require_one(value: object, checkpoint: Folder | None, name: str = "scheme") -> None:
    """Raises ValueError on a scheme, or another option that a checkpoint has, beside one; and on
    the scheme int8-calibrated without one.
    """
    if checkpoint is not None and value is not None:
        raise ValueError(
            f"accelerate: {name} must be left out beside a checkpoint, which has its own, got"
            f" {value!r}"
        )
    if checkpoint is None and value == "int8-calibrated":
        raise ValueError(
            "accelerate: scheme int8-calibrated must be calibrated on photos, got none; run `lraee"
            " quantize --data PHOTOS --out CHECKPOINT` once, then give --checkpoint CHECKPOINT"
        )
