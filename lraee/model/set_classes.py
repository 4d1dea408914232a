"""set_classes: gives the gate of an accelerated model other classes, without training anything."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.exits.router import Router
from lraee.towers.families import can_encode_text, device_of, encode_text, find_tower
from lraee.towers.runner import exits_of


class ClassSetter:
    """`model.set_classes(text_features)` of a model with early exits.

    An attribute of the instance, since the model keeps its own class. It holds its model weakly,
    so that a model is freed as soon as one without exits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(
        self,
        classes: Tensor | Sequence[str],
        tokenizer: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        """Replaces the classes that the gate looks for; heads and thresholds stay.

        Args:
          classes: text embeddings, any float type [K, E], K >= 1, of any length above 0; or texts,
            such as "a photo of a dog".
          tokenizer: of the model, for texts.
        Raises: ValueError, TypeError on classes that are neither; the old ones then stay.
        """
        model = self.model()
        assert model is not None
        router = cast(Router, exits_of(find_tower(model)))
        if not isinstance(classes, Tensor):
            classes = _encode_texts(model, classes, tokenizer)
        router.set_classes(unit_classes("set_classes", classes, router.classes.shape[1]))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassSetter":
        return ClassSetter(memo[id(self.model())])

    def __reduce__(self) -> tuple[type["ClassSetter"], tuple[nn.Module | None]]:
        return ClassSetter, (self.model(),)


def unit_classes(caller: str, classes: Tensor, E: int) -> Tensor:
    """Text embeddings [K, E] as float32 rows of length 1, or one line that says what is wrong.

    Raises: TypeError, ValueError.
    """
    if not isinstance(classes, Tensor) or not classes.is_floating_point():
        got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"{caller}: classes must be a float tensor [K, E], got {got}")
    if classes.dim() != 2 or classes.shape[0] < 1 or classes.shape[1] != E:
        raise ValueError(
            f"{caller}: classes must have shape [K >= 1, E] with E = {E}, got {list(classes.shape)}"
        )
    rows = classes.detach().float()
    length = rows.norm(dim=1, keepdim=True)
    if not (torch.isfinite(length) & (length > 0)).all():
        raise ValueError(f"{caller}: classes must be finite and no row zero, got one that is not")
    unit: Tensor = rows / length
    return unit


def _encode_texts(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor] | None,
) -> Tensor:
    """Text embeddings [K, E] by the model's own text tower."""
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise TypeError("set_classes: classes must be a float tensor [K, E] or a list of texts")
    if not texts:
        raise ValueError("set_classes: classes must be one text at least, got none")
    if tokenizer is None or not can_encode_text(model):
        raise ValueError(
            "set_classes: tokenizer must be given with texts, and the model have encode_text; or"
            " give text features [K, E]"
        )
    tokens = tokenizer(list(texts)).to(device_of(model))
    with torch.no_grad():
        return encode_text(model, tokens)
