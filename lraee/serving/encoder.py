"""A CLIP model as the batcher runs it: tensors and texts in, unit rows out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.data.decoding import Mode
from lraee.data.preprocess import from_transform
from lraee.data.sources import DataError
from lraee.model.acceleration import acceleration_of
from lraee.model.opened import accelerated
from lraee.model.trace import has_exits, trace
from lraee.serving.batching import Kind, Result
from lraee.towers import hub
from lraee.towers.families import image_size
from lraee.towers.prompts import class_features
from lraee.zoo.opening import ModelError, Opened, open_model


@dataclass(frozen=True)
class ModelChoice:
    """Which model to serve, and how.

    Args:
      name: of the zoo or of open_clip; NAME__TAG is NAME with the weights of that tag, as immich
        writes it.
      pretrained: the tag or weights file, where the name has none.
      scheme: as in `accelerate`; "float" serves the model as it is; None: that of the exits, else
        "int8".
      exits: what `lraee calibrate` made, or None.
      text: as in `accelerate`: "int8", or None for the float text tower.
      mode: how images are decoded: "fast" scales JPEG while it is decoded, "exact" gives the pixels
        of the model's own transform.
      checkpoint: where lraee.save wrote, or None; it has a scheme and a text tower of its own.
    """

    name: str
    pretrained: str | None = None
    scheme: str | None = None
    exits: Path | None = None
    text: str | None = None
    mode: Mode = "fast"
    checkpoint: Path | None = None

    def open(self) -> "ClipEncoder":
        """The model, accelerated. Raises: ModelError and what `accelerate` raises, in one line."""
        name, _, tag = self.name.partition("__")
        opened = open_model(name, self.pretrained or tag or None)
        if not hasattr(opened.model, "encode_text"):
            raise ModelError(f"serve: model must have a text tower, got {name}")
        served = Path(name).name + (f"__{tag}" if tag else "")
        if self.scheme == "float":
            return ClipEncoder(served, opened, opened.model, mode=self.mode)
        fast = accelerated(
            opened.model,
            scheme=self.scheme,
            exits=self.exits,
            text=self.text,
            checkpoint=self.checkpoint,
        )
        about = acceleration_of(fast)
        is_invariant = about is not None and about.text is not None
        return ClipEncoder(served, opened, fast, mode=self.mode, is_text_invariant=is_invariant)


class ClipEncoder:
    """encode("image", [tensors]), encode("text", [strings]), encode("class", [names]).

    Image rows have the same bits in any batch. A float text tower's last bits depend on its batch:
    its texts run one by one, and a class name's prompts together, so that their rows do not depend
    on who else asks.

    Args:
      name: that clients use.
      opened: tokenizer, preprocessing and title.
      model: what runs; its image tower may have exits.
      mode: how images are decoded.
      is_text_invariant: whether texts have the same bits in any batch.
    """

    def __init__(
        self,
        name: str,
        opened: Opened,
        model: nn.Module,
        *,
        mode: Mode = "fast",
        is_text_invariant: bool = False,
    ) -> None:
        """See the class."""
        self.name, self.opened = name, opened
        try:
            self.preprocess = from_transform(opened.preprocess, mode=mode)
        except ValueError as error:
            raise DataError(str(error)) from error
        self._model = model.eval()
        self._is_text_invariant = is_text_invariant
        self._has_exits = has_exits(model)
        self._device = next(model.parameters()).device
        about = acceleration_of(model)
        self.weights = None if about is None else about.base_hash
        self.image_size = image_size(model)
        self.logit_scale = float(cast(Tensor, model.logit_scale).detach().exp())
        self.width = len(self.encode("text", ["a photo"])[0].embedding)

    def batch_limit(self, kind: Kind) -> int:
        """Images by the batcher's limit; texts one by one unless their bits allow more."""
        return 1 << 20 if kind == "image" or (kind == "text" and self._is_text_invariant) else 1

    @torch.inference_mode()
    def encode(self, kind: Kind, payloads: Sequence[Any]) -> list[Result]:
        """Images float32 [3, H, W], texts, or class names -> one unit row each."""
        if kind == "image":
            return self._images(torch.stack(list(payloads)).to(self._device))
        if kind == "class":
            names = list(payloads)
            rows = class_features(self._model, self.opened.tokenizer, names, progress=False)
        else:
            tokens = self.opened.tokenizer(list(payloads)).to(self._device)
            encode_text = cast(Callable[..., Tensor], self._model.encode_text)
            rows = encode_text(tokens, normalize=True)
            counts = hub.count_tokens(self.opened.tokenizer, tokens).tolist()
            pairs = zip(rows.float().cpu().numpy(), counts, strict=True)
            return [Result(row, tokens=count) for row, count in pairs]
        return [Result(row) for row in rows.float().cpu().numpy()]

    def _images(self, images: Tensor) -> list[Result]:
        encode_image = cast(Callable[..., Tensor], self._model.encode_image)
        if not self._has_exits:
            rows = encode_image(images, normalize=True).float().cpu().numpy()
            return [Result(row) for row in rows]
        with trace(self._model) as t:
            rows = encode_image(images, normalize=True).float().cpu().numpy()
        return [Result(row, int(at)) for row, at in zip(rows, t.exit_block, strict=True)]
