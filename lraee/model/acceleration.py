"""The record of an acceleration, and what marks an accelerated tower."""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lraee.exits.bundle import Exits
from lraee.layers.int8_block import TRAIN_REFUSED, Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.modules import T, Take, put_module
from lraee.layers.scheme import Scheme
from lraee.layers.spec import tensor_at
from lraee.model.text import TextRecord
from lraee.ops.backend import Backend
from lraee.towers import runner, text_encoder
from lraee.towers import text as texts
from lraee.towers.families import blocks_of, family_of, find_tower, tower_spec
from lraee.towers.state import tower_hash

_ATTRIBUTE = "lraee"


@dataclass(frozen=True)
class Acceleration:
    """How an accelerated tower was made; `acceleration_of` reads it.

    Args:
      scheme: how it was quantized.
      backend: which implementation it was given.
      base_hash: tower_hash of the float image tower, or of a text tower alone.
      skeletons: the float blocks, and the patch embedding where it is int8, without their numbers.
      original: the float tower, as long as its owner keeps it; not pickled.
      exits: its early exits, or None.
      text: of the text tower in int8, or None for a float one.
    """

    scheme: Scheme
    backend: Backend
    base_hash: str
    skeletons: tuple[nn.Module, ...]
    original: weakref.ref[nn.Module] | None
    exits: Exits | None = None
    text: TextRecord | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Acceleration":
        return self  # nothing in it ever changes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}


def image_tower(model: nn.Module) -> nn.Module | None:
    """The image tower, or None of a model that is nothing but a text tower.

    Raises: TypeError, NotImplementedError on any other model without an image tower.
    """
    return None if texts.text_alone(model) is not None else find_tower(model)


def _holder(model: nn.Module) -> nn.Module:
    """The module that carries the record: the image tower, or what holds a text tower alone."""
    tower = image_tower(model)
    return cast(texts.TextTower, texts.text_alone(model)).owner if tower is None else tower


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """How this model was accelerated, or None."""
    return cast(Acceleration | None, getattr(_holder(model), _ATTRIBUTE, None))


def base_hash_of(model: nn.Module) -> str:
    """tower_hash of a float model's image tower, or of the module that is a text tower alone."""
    return tower_hash(_holder(model).state_dict())


def replaced_paths(tower: nn.Module | None, scheme: Scheme) -> list[str]:
    """Where the scheme replaces: the blocks, and last the patch embedding where it is int8."""
    if tower is None:
        return []
    spec = tower_spec(tower)
    paths = [f"{spec.blocks}.{i}" for i in range(len(blocks_of(tower)))]
    return [*paths, *([spec.patch_embedding.path] if scheme.patch_embedding == "int8" else [])]


def replaced_parts(tower: nn.Module | None, scheme: Scheme) -> list[nn.Module]:
    """What the scheme replaces, in the order of replaced_paths; nothing where there is no tower."""
    paths = replaced_paths(tower, scheme)
    return [] if tower is None else [tower.get_submodule(path) for path in paths]


def weight_dtypes(part: nn.Module, skeleton: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    """The float type that an int8 part computes for now, and that of the float part's weights."""
    if isinstance(part, Int8Block):
        weight = part.block_spec.mlp.fc1.parts[0].weight
        return part.get_weight_dtype(), tensor_at(skeleton, weight).dtype
    return cast(Int8Linear, part).dtype, cast(nn.Linear, skeleton).weight.dtype


def copier(memo: dict[int, Any]) -> Take:
    """Deep copies, all with one memo."""
    return lambda part: copy.deepcopy(part, memo)


def as_is(part: T) -> T:
    """The part itself."""
    return part


class _TrainGuard:
    """`module.train` of an accelerated module: refuses before any child has switched.

    An attribute of the instance, since the model keeps its own class. It holds its module weakly,
    so that an accelerated model is freed as soon as a float one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __call__(self, mode: bool = True) -> nn.Module:
        module = self.module()
        assert module is not None
        if mode:
            raise RuntimeError(TRAIN_REFUSED)
        return type(module).train(module, False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_TrainGuard":
        return _TrainGuard(memo[id(self.module())])

    def __reduce__(self) -> tuple[type["_TrainGuard"], tuple[nn.Module | None]]:
        return _TrainGuard, (self.module(),)


def _guarded(model: nn.Module, record: Acceleration) -> list[nn.Module]:
    """Every module whose train() reaches an int8 block; the blocks refuse by themselves."""
    tower = image_tower(model)
    paths = () if tower is None else ("", *tower_spec(tower).block_parents)
    parents = [cast(nn.Module, tower).get_submodule(path) for path in paths]
    text = None if record.text is None else texts.find_text(model)
    return [model, *parents, *([] if text is None else text.guarded)]


def set_record(model: nn.Module, record: Acceleration) -> None:
    """Sets what `acceleration_of` reads."""
    setattr(_holder(model), _ATTRIBUTE, record)


def mark_fast(model: nn.Module, record: Acceleration) -> None:
    """Makes the float layers row-wise, cuts texts at their end, and makes train() refuse."""
    set_record(model, record)
    tower = image_tower(model)
    if tower is not None:
        runner.make_rowwise(tower, record.backend)
        family_of(tower).settle(model)
    text_encoder.attach(model, None if record.text is None else record.backend)
    for module in _guarded(model, record):
        module.__dict__["train"] = _TrainGuard(module)


def mark_float(
    model: nn.Module, float_parts: Sequence[nn.Module], text_blocks: Sequence[nn.Module] = ()
) -> None:
    """Puts the float parts (back) in, and takes marks and guards off.

    Args:
      model: accelerated.
      float_parts: what stood where replaced_parts stand.
      text_blocks: the float blocks of a text tower in int8.
    """
    tower, record = image_tower(model), cast(Acceleration, acceleration_of(model))
    paths = replaced_paths(tower, record.scheme)
    for path, part in zip(paths, float_parts, strict=False):
        put_module(cast(nn.Module, tower), path, part)
    text = texts.find_text(model)
    if text is not None:
        for i, block in enumerate(text_blocks):
            put_module(text.owner, text.spec.block_path(i), block)
    text_encoder.detach(model)
    delattr(_holder(model), _ATTRIBUTE)
    if tower is not None:
        runner.unmake_rowwise(tower)
        family_of(tower).settle(model)
    for module in _guarded(model, record):
        module.__dict__.pop("train", None)
        module.__dict__.pop("set_classes", None)
