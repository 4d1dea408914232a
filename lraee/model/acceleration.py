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

_ATTRIBUTE = "lraee"


@dataclass(frozen=True)
class Acceleration:
    """How an accelerated tower was made; `acceleration_of` reads it.

    Args:
      scheme: how it was quantized.
      backend: which implementation it was given.
      base_hash: tower_hash of the float tower.
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


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """How this model was accelerated, or None."""
    return cast(Acceleration | None, getattr(find_tower(model), _ATTRIBUTE, None))


def replaced_paths(tower: nn.Module, scheme: Scheme) -> list[str]:
    """Where the scheme replaces: the blocks, and last the patch embedding where it is int8."""
    spec = tower_spec(tower)
    paths = [f"{spec.blocks}.{i}" for i in range(len(blocks_of(tower)))]
    return [*paths, *([spec.patch_embedding.path] if scheme.patch_embedding == "int8" else [])]


def replaced_parts(tower: nn.Module, scheme: Scheme) -> list[nn.Module]:
    """What the scheme replaces, in the order of replaced_paths."""
    return [tower.get_submodule(path) for path in replaced_paths(tower, scheme)]


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
    tower = find_tower(model)
    parents = [tower.get_submodule(path) for path in tower_spec(tower).block_parents]
    text = None if record.text is None else texts.find_text(model)
    return [model, tower, *parents, *([] if text is None else text.guarded)]


def set_record(tower: nn.Module, record: Acceleration) -> None:
    """Sets what `acceleration_of` reads."""
    setattr(tower, _ATTRIBUTE, record)


def mark_fast(model: nn.Module, record: Acceleration) -> None:
    """Makes the float layers row-wise, cuts texts at their end, and makes train() refuse."""
    tower = find_tower(model)
    set_record(tower, record)
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
    tower = find_tower(model)
    spec, record = tower_spec(tower), cast(Acceleration, acceleration_of(model))
    paths = [f"{spec.blocks}.{i}" for i in range(len(blocks_of(tower)))]
    for path, part in zip([*paths, spec.patch_embedding.path], float_parts, strict=False):
        put_module(tower, path, part)
    text = texts.find_text(model)
    if text is not None:
        for i, block in enumerate(text_blocks):
            put_module(text.owner, text.spec.block_path(i), block)
    text_encoder.detach(model)
    delattr(tower, _ATTRIBUTE)
    runner.unmake_rowwise(tower)
    family_of(tower).settle(model)
    for module in _guarded(model, record):
        module.__dict__.pop("train", None)
        module.__dict__.pop("set_classes", None)
