"""The int8 text tower of an accelerated model: what is remembered of the float one."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from lraee.layers.modules import without_numbers
from lraee.towers.state import tower_hash
from lraee.towers.text import TextTower, find_text

TextScheme = Literal["int8"]


@dataclass(frozen=True)
class TextRecord:
    """How a text tower in int8 was made.

    Args:
      base_hash: tower_hash of the float blocks.
      skeletons: the float blocks without their numbers.
      original: the list of float blocks, as long as its owner keeps it; not pickled.
    """

    base_hash: str
    skeletons: tuple[nn.Module, ...]
    original: weakref.ref[nn.Module] | None

    @classmethod
    def of(cls, tower: TextTower, base_hash: str | None, *, is_kept: bool) -> "TextRecord":
        """Of a float tower; is_kept says whether its owner keeps the float blocks."""
        return cls(
            base_hash=base_hash or tower_hash(tower.blocks.state_dict()),
            skeletons=tuple(without_numbers(block) for block in tower.blocks),
            original=weakref.ref(tower.blocks) if is_kept else None,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}


def require_text_scheme(text: str | None) -> None:
    """Raises ValueError on a name that is none of the choices."""
    choices = get_args(TextScheme)
    if text is not None and text not in choices:
        raise ValueError(f"accelerate: text must be None or {', '.join(choices)}, got {text!r}")


def base_weights(
    model: nn.Module, record: TextRecord, base: nn.Module | Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """State dict of the float blocks that an accelerated model was made of.

    Args:
      model: the accelerated model.
      record: of its text tower.
      base: as in lraee.restore.
    Raises: LookupError if there are none, ValueError if they are not those that accelerate saw.
    """
    weights = _weights(cast(TextTower, find_text(model)), record, base)
    if weights is None:
        raise LookupError(
            "restore: base must hold the text tower that accelerate saw, got none; give"
            " base=<the original model or its state dict>"
        )
    result = tower_hash(weights)
    if result != record.base_hash:
        raise ValueError(
            "restore: the text tower must hold the weights that accelerate saw (sha256"
            f" {record.base_hash[:12]}), got {result[:12]}; give base=<model or state dict with the"
            " original weights>"
        )
    return weights


def _weights(
    tower: TextTower, record: TextRecord, base: nn.Module | Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    if isinstance(base, nn.Module):
        own = find_text(base)
        return None if own is None else own.blocks.state_dict()
    if base is None:
        original = None if record.original is None else record.original()
        return None if original is None else original.state_dict()
    prefix = ".".join(filter(None, (tower.spec.path, tower.spec.blocks))) + "."
    return {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)} or None
