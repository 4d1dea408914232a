"""Saves the int8 weights of an accelerated model, and builds the same model from them again.

A checkpoint is a directory with two files: `int8-<hash>.safetensors`, w_q and w_scale of each
quantized linear and the tensors of the early exits, if there are some, and `lraee.json`, which says
how to read it. All that stays float comes from the float model; its hash is in the file. A save
that is cut off leaves the checkpoint that was there before, see storage.sealed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from lraee.exits import serialization
from lraee.exits.bundle import Exits, one_class
from lraee.layers.scheme import Scheme
from lraee.model.accelerate import add_exits, assemble, checked_tower, replace_exits
from lraee.model.acceleration import (
    Acceleration,
    acceleration_of,
    base_hash_of,
    image_tower,
    replaced_parts,
    weight_dtypes,
)
from lraee.ops.backend import Backend
from lraee.quantization.calibrated import other_shapes, others_of
from lraee.storage import sealed
from lraee.storage.files import require
from lraee.storage.schema import DIGEST, NAME, Spec, Specs, choice, nullable, record, sized, table
from lraee.towers import text as texts
from lraee.towers.families import int8_linears, int8_shapes, linear_shapes
from lraee.towers.runner import exits_of
from lraee.towers.state import tower_hash
from lraee.towers.text import find_text

Model = TypeVar("Model", bound=nn.Module)

FORMAT = sealed.Format(
    name="lraee int8 checkpoint",
    version=2,
    config_name="lraee.json",
    prefix="int8",
    saver="lraee.save",
    fields={
        "versions": table(NAME, 1, 16),
        "scheme": serialization.SCHEME,
        "backend": choice(*get_args(Backend)),
        "base_sha256": DIGEST,  # tower_hash of the float image tower, or of a text tower alone
        "state_sha256": DIGEST,  # the same hash of the whole accelerated model
        "exits": nullable(record(serialization.FIELDS, since=serialization.FIELDS_SINCE)),
        "text": nullable(record({"scheme": choice("int8"), "base_sha256": DIGEST})),
    },
    since={"text": None},
)
_LINEAR = {"w_q": Spec(torch.int8, "NK"), "w_scale": Spec(torch.float32, "N", "finite and above 0")}
_EXITS = "exits."  # before the names of the exits' tensors
_VERSIONS = ("lraee", "torch", "open_clip_torch")


def _specs(
    shapes: Mapping[str, Sequence[int]], exits: Any, others: Mapping[str, tuple[int, ...]]
) -> Specs:
    """What the tensors must be: of linears of these shapes [N, K], of the fields of exits, and the
    biases, norms and input scales of a calibrated tower.
    """
    specs: Specs = {
        name: Spec(torch.float32, shape, "finite and above 0" if _is_scale(name) else "finite")
        for name, shape in others.items()
    }
    for name, (N, K) in shapes.items():
        specs |= sized(f"{name}.", _LINEAR, {"N": N, "K": K})
    own = {} if exits is None else serialization.tensor_specs(exits)
    return specs | {_EXITS + name: spec for name, spec in own.items()}


def _is_scale(name: str) -> bool:
    return name.endswith(".in_scale")


# Saving


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes int8 weights and exits of an accelerated model; load builds the same model from them.

    The classes that its exits look for now are saved, those of set_classes if it was called.

    Args:
      model: from lraee.accelerate or lraee.load, in the float type it was accelerated in.
      directory: made if it is not there; a checkpoint in it is replaced in one step.
    Raises: ValueError if the model is not accelerated, was cast, or has numbers that load
      refuses.
    """
    record = acceleration_of(model)
    if record is None:
        raise ValueError("save: model must be accelerated, got a float one")
    tower = image_tower(model)
    _require_uncast(replaced_parts(tower, record.scheme), record.skeletons)
    linears = {} if tower is None else int8_linears(tower)
    text = find_text(model)
    if text is not None and record.text is not None:
        _require_uncast(text.blocks, record.text.skeletons)
        linears |= texts.int8_linears(text)
    tensors = {
        f"{name}.{own}": sealed.own_copy(getattr(linear, own))
        for name, linear in linears.items()
        for own in _LINEAR
    }
    held = {} if tower is None else others_of(tower, record.scheme)
    others = {name: sealed.own_copy(tensor) for name, tensor in held.items()}
    other_sizes = {name: tuple(tensor.shape) for name, tensor in others.items()}
    tensors |= others
    exits = _current_exits(tower, record)
    exits_fields, exits_tensors = (None, {}) if exits is None else serialization.to_parts(exits)
    tensors |= {_EXITS + name: tensor for name, tensor in exits_tensors.items()}
    fields = {
        "versions": {name: version(name) for name in _VERSIONS},
        "scheme": record.scheme.fields,
        "backend": record.backend,
        "base_sha256": record.base_hash,
        "state_sha256": tower_hash(model.state_dict()),
        "exits": exits_fields,
    }
    if record.text is not None:  # without it, older versions read the file as well
        fields["text"] = {"scheme": "int8", "base_sha256": record.text.base_hash}
    shapes = {name: tuple(linear.w_q.shape) for name, linear in linears.items()}
    sealed.write(
        Path(directory), FORMAT, fields, tensors,
        lambda checked: _specs(shapes, checked["exits"], other_sizes),
    )  # fmt: skip


def _require_uncast(parts: Iterable[nn.Module], skeletons: Sequence[nn.Module]) -> None:
    """Raises ValueError where the model was cast after it was accelerated."""
    for part, skeleton in zip(parts, skeletons, strict=True):
        base = {name: parameter.dtype for name, parameter in skeleton.named_parameters()}
        pairs = [(p.dtype, base.get(name, p.dtype)) for name, p in part.named_parameters()]
        pairs.append(weight_dtypes(part, skeleton))
        for dtype, expected in pairs:
            if dtype != expected:
                raise ValueError(
                    f"save: model must be of the type it was accelerated in, {expected}, got"
                    f" {dtype}; accelerate again from the model of that type"
                )


def _current_exits(tower: nn.Module | None, record: Acceleration) -> Exits | None:
    """The exits with the classes that they look for now."""
    exits, router = record.exits, None if tower is None else exits_of(tower)
    if exits is None or router is None:
        return None
    classes = router.classes.cpu()
    had_none = one_class(next(iter(exits.heads.values())))
    if exits.classes is None and torch.equal(classes, had_none):
        return exits
    return replace(exits, classes=classes)


# Loading


def load(
    directory: str | os.PathLike[str],
    model: Model,
    *,
    backend: Backend | None = None,
    exits: Exits | str | os.PathLike[str] | None = None,
) -> Model:
    """The accelerated model that was saved, bit for bit, built from its float original.

    Nothing is quantized again, nothing unpickled. Hashes guard against damage and against other
    float weights; they are no signature: a checkpoint made by an attacker can hold any weights.

    Args:
      directory: where lraee.save wrote.
      model: the float model that was accelerated, text tower included; it stays as it is.
      backend: as in accelerate; None takes the one of the saved model.
      exits: from lraee.calibrate on this model, or where Exits.save put them; they take the place
        of those that were saved.
    Raises: CheckpointError on files or float weights that are not those that were saved;
      TypeError, NotImplementedError, ValueError or RuntimeError as accelerate.
    """
    with sealed.opened(Path(directory), FORMAT) as saved:
        fields = saved.fields
        backend, scheme = backend or fields["backend"], fields["scheme"]
        text = None if fields["text"] is None else fields["text"]["scheme"]
        tower = checked_tower(model, replace(scheme, keep_float=()), backend, text)
        base_hash = base_hash_of(model)
        with saved.refusing():
            rule = "base_sha256 must be that of the image tower of the given model"
            require(base_hash == fields["base_sha256"], rule, base_hash, _ADVICE)
            of_text = {} if text is None else _text_shapes(model, fields["text"])
            of_images = {} if tower is None else linear_shapes(tower)
            unknown = sorted(set(scheme.keep_float) - {*of_images, *of_text})
            require(not unknown, "scheme.keep_float must name linears of the model", unknown)
            shapes = {n: shape for n, shape in of_text.items() if n not in scheme.keep_float}
            shapes |= {} if tower is None else int8_shapes(tower, scheme)
            others = {} if tower is None else other_shapes(tower, scheme)
            specs = _specs(shapes, fields["exits"], others)
        tensors = saved.tensors(specs)
        calibrated = _calibrated(tensors, scheme, of_text)
        if calibrated is not None:
            with saved.refusing():
                digest = tower_hash(calibrated)
                rule = "scheme.calibration must be the sha256 of the tensors"
                require(digest == scheme.calibration, rule, digest)

    def stored(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        w_q, w_scale = (tensors[f"{name}.{own}"].to(weight.device) for own in _LINEAR)
        return w_q, w_scale

    fast = assemble(
        model,
        scheme=scheme,
        backend=backend,
        base_hash=base_hash,
        text_hash=None if text is None else fields["text"]["base_sha256"],
        quantize=stored,
        calibrated=calibrated,
    )
    with saved.refusing():
        own_exits = _exits(fields, tensors)
        if own_exits is not None:
            add_exits(fast, own_exits)
        state_hash = tower_hash(fast.state_dict())
        rule = "state_sha256 must be that of the given model with these int8 weights"
        rule += " (another text tower, or a version of lraee that quantizes this one otherwise?)"
        require(state_hash == fields["state_sha256"], rule, state_hash, _ADVICE)
    if exits is not None:
        replace_exits(fast, exits if isinstance(exits, Exits) else Exits.load(exits))
    return fast


def _calibrated(
    tensors: Mapping[str, Tensor], scheme: Scheme, text: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """Linears and norms of a calibrated tower among the tensors of its checkpoint."""
    if not scheme.calibration:
        return None
    others = (_EXITS, *(f"{name}." for name in text))
    return {name: t for name, t in tensors.items() if not name.startswith(others)}


def _text_shapes(model: nn.Module, fields: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears of the text tower's blocks, which must be those that were saved."""
    tower = texts.require_text(model)
    base_hash = tower_hash(tower.blocks.state_dict())
    rule = "text.base_sha256 must be that of the text tower of the given model"
    require(base_hash == fields["base_sha256"], rule, base_hash, _ADVICE)
    return texts.linear_shapes(tower)


_ADVICE = "give the float model that was accelerated, in the same dtype"


def _exits(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Exits | None:
    """The exits of this checkpoint, made for its own tower and scheme."""
    if fields["exits"] is None:
        return None
    own = {
        name.removeprefix(_EXITS): tensor
        for name, tensor in tensors.items()
        if name.startswith(_EXITS)
    }
    exits = serialization.from_parts(fields["exits"], own, Exits)
    is_own = exits.base_hash == fields["base_sha256"]
    require(is_own, "exits.base_hash must be base_sha256", exits.base_hash)
    require(exits.scheme == fields["scheme"], "exits.scheme must be scheme", exits.scheme)
    return exits
