"""The model that embeds: an accelerated image tower with its preprocessing, or a text tower."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lraee.data import preprocess
from lraee.data.decoding import Limits, Mode
from lraee.data.sources import DataError
from lraee.model.acceleration import acceleration_of
from lraee.model.opened import accelerated
from lraee.model.trace import has_exits, trace
from lraee.serving.embed import Prepared
from lraee.storage.files import CheckpointError
from lraee.towers.families import image_size
from lraee.towers.state import tower_hash
from lraee.zoo.opening import Opened, open_model

DTYPES = ("float32", "float16")
# What decides whether a photo is refused must not depend on how busy the machine is: far more time
# than decoding takes, which is bounded by pixels, scans and memory
MAX_SECONDS = 120.0


@dataclass(frozen=True)
class Choice:
    """What the embeddings depend on, photos aside; it can be sent to another process.

    Args:
      model, pretrained: as `open_model` takes them.
      scheme: of `accelerate`; None: that of the exits, else "int8".
      exits: folder from `lraee calibrate`, or None.
      mode: "fast" scales JPEG while it is decoded, "exact" gives the bits of the model's transform.
      limits: what is refused undecoded.
      dtype: of the column `embedding`.
      version: lraee's.
      checkpoint: where lraee.save wrote, or None; it has a scheme and a text tower of its own.
      text: of `accelerate`, for texts.
    """

    model: str
    version: str
    pretrained: str | None = None
    scheme: str | None = None
    exits: Path | None = None
    mode: Mode = "fast"
    limits: Limits = Limits(max_seconds=MAX_SECONDS)
    dtype: str = "float32"
    checkpoint: Path | None = None
    text: str | None = None

    def settings(self, opened: Opened, **more: Any) -> dict[str, Any]:
        """As the metadata of a file has it."""
        return {
            "model": opened.title, "normalized": True, "dtype": self.dtype,
            "lraee": self.version, **more,
        }  # fmt: skip


class PhotoModel:
    """Photos to unit embeddings; a photo's embedding has the same bits in any batch.

    `opened`: the model of the choice where it is open already; it is changed.

    Raises: as `open_model` and `accelerate`.
    """

    def __init__(self, choice: Choice, opened: Opened | None = None) -> None:
        self._choice = choice
        self._opened = opened or open_model(choice.model, choice.pretrained)
        self._model = accelerated(
            self._opened.model,
            scheme=choice.scheme,
            exits=choice.exits,
            checkpoint=choice.checkpoint,
        )
        try:
            self._preprocess = preprocess.from_transform(
                self._opened.preprocess, mode=choice.mode, limits=choice.limits
            )
        except ValueError as error:
            raise DataError(str(error)) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """See Choice; runs the tower once."""
        about = acceleration_of(self._model)
        assert about is not None
        black = Prepared(np.zeros((3, *image_size(self._model)), np.float32))
        return self._choice.settings(
            self._opened,
            kind="photos",
            weights=about.base_hash,
            scheme=about.scheme.fields,
            exits=_file_hash(self._choice.exits, "exits.json"),
            **_checkpoint(self._choice),
            preprocess=_rules(self._preprocess),
            dimensions=self.encode([black])[0].shape[1],
        )

    def prepare(self, data: bytes) -> Prepared:
        """Pixels float32 [3, H, W] of one photo; raises DataError."""
        image, (height, width) = self._preprocess.with_size(data)
        return Prepared(image.numpy(), width, height)

    @torch.inference_mode()
    def encode(self, rows: Sequence[Prepared]) -> tuple[np.ndarray, Sequence[int | None]]:
        """Embeddings float32 [n, E], and after how many blocks each photo left, None at its end."""
        images = torch.from_numpy(np.stack([row.data for row in rows]))
        encode = cast(Callable[..., Tensor], self._model.encode_image)
        if not has_exits(self._model):
            return encode(images, normalize=True).float().numpy(), [None] * len(rows)
        with trace(self._model) as t:
            embeddings = encode(images, normalize=True).float().numpy()
        return embeddings, t.exit_block.tolist()


class TextModel:
    """Texts to unit embeddings, by the float text tower, or by an int8 one.

    The last bits of a float one depend on the texts in a batch, so `batch` is one of the settings.

    Raises: as `open_model` and `accelerate`.
    """

    def __init__(self, choice: Choice, batch: int) -> None:
        self._choice, self._batch = choice, batch
        self._opened = open_model(choice.model, choice.pretrained)
        state = self._opened.model.state_dict()
        self._weights = tower_hash({k: v for k, v in state.items() if not k.startswith("visual.")})
        self._model = self._opened.model
        if choice.text is not None or choice.checkpoint is not None:
            self._model = accelerated(
                self._model, scheme=choice.scheme, text=choice.text, checkpoint=choice.checkpoint
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """See Choice; runs the tower once."""
        about = acceleration_of(self._model)
        scheme = {"scheme": about.scheme.fields} if about is not None and about.text else {}
        return self._choice.settings(
            self._opened,
            kind="texts",
            weights=self._weights,
            batch=self._batch,
            **scheme,
            **_checkpoint(self._choice),
            dimensions=self.encode([Prepared("")])[0].shape[1],
        )

    def prepare(self, data: bytes) -> Prepared:
        """The text itself."""
        return Prepared(data.decode())

    @torch.inference_mode()
    def encode(self, rows: Sequence[Prepared]) -> tuple[np.ndarray, Sequence[int | None]]:
        """Embeddings float32 [n, E]."""
        tokens = self._opened.tokenizer([row.data for row in rows])
        encode = cast(Callable[..., Tensor], self._model.encode_text)
        return encode(tokens, normalize=True).float().numpy(), [None] * len(rows)


def _rules(rules: preprocess.Preprocess) -> dict[str, Any]:
    """All that a Preprocess is made of, its table by its hash."""
    about = {field.name: getattr(rules, field.name) for field in fields(rules)}
    table = hashlib.sha256(about.pop("table").tobytes()).hexdigest()
    return {**about, "limits": asdict(rules.limits), "table": table}


def _checkpoint(choice: Choice) -> dict[str, str | None]:
    folder = choice.checkpoint
    return {} if folder is None else {"checkpoint": _file_hash(folder, "lraee.json")}


def _file_hash(folder: Path | None, name: str) -> str | None:
    """sha256 of the file of this name, which holds the hash of its tensors."""
    if folder is None:
        return None
    try:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"load: {folder}: must hold {name}") from error
