"""Saves the int8 weights of an accelerated model, and builds the same model from them again.

A checkpoint is a directory with two files: `int8-<hash>.safetensors`, w_q and w_scale of each
quantized linear and the tensors of the early exits, if there are some, and `lraee.json`, which says
how to read it. All that stays float comes from the float model; its hash is in the file. A save
that is cut off leaves the checkpoint that was there before, see lraee.sealed.
"""

import os
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from lraee.exits.bundle import Exits, one_class
from lraee.exits.serialization import from_parts, tensor_shapes, to_parts
from lraee.layers.scheme import SINCE, Scheme
from lraee.model.accelerate import Acceleration, acceleration_of, add_exits, assemble, checked_tower
from lraee.ops.backend import Backend
from lraee.storage import sealed
from lraee.storage.files import is_sha256, parse_options, refuse, refusing, require_keys
from lraee.storage.sealed import Format, Shapes
from lraee.towers import open_clip as towers
from lraee.towers import runner as vision

Model = TypeVar("Model", bound=nn.Module)

FORMAT = Format(
    name="lraee int8 checkpoint",
    version=2,
    config_name="lraee.json",
    prefix="int8",
    saver="lraee.save",
    fields=frozenset({"versions", "scheme", "backend", "base_sha256", "state_sha256", "exits"}),
)

_EXITS = "exits."  # before the names of the exits' tensors
_VERSIONS = ("lraee", "torch", "open_clip_torch")


@dataclass(frozen=True)
class _Fields:
    """What lraee.json says of the model, each value of the right type.

    Args:
      base_sha256: towers.tower_hash of the float tower.
      state_sha256: the same hash of the whole accelerated model.
      exits: None, or the fields of its early exits, not checked yet.
    """

    scheme: Scheme
    backend: Backend
    base_sha256: str
    state_sha256: str
    exits: Any


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
    made = acceleration_of(model)
    if made is None:
        raise ValueError("save: model must be accelerated, got a float one")
    tower = towers.find_tower(model)
    # not strict: the skeletons may end in that of the patch embedding
    for block, skeleton in zip(towers.blocks_of(tower), made.skeletons, strict=False):
        found, base = cast(Any, block).get_weight_dtype(), next(skeleton.parameters()).dtype
        if found != base:
            raise ValueError(
                f"save: model must be of the type it was accelerated in, {base}, got {found};"
                " accelerate again from the model of that type"
            )
    tensors = _tensors_of(tower)
    wrong = _wrong_scale(tensors)
    if wrong is not None:
        raise ValueError(f"save: {wrong[0]} must be finite and above 0, got {wrong[1]}")
    exits = _current_exits(tower, made)
    exits_fields, exits_tensors = (None, {}) if exits is None else to_parts(exits)
    tensors |= {_EXITS + name: tensor for name, tensor in exits_tensors.items()}
    fields = {
        "versions": {name: version(name) for name in _VERSIONS},
        "scheme": asdict(made.scheme),
        "backend": made.backend,
        "base_sha256": made.base_hash,
        "state_sha256": towers.tower_hash(model.state_dict()),
        "exits": exits_fields,
    }
    sealed.write(Path(directory), FORMAT, fields, tensors)


def _tensors_of(tower: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, linear in towers.int8_linears(tower).items():
        tensors[f"{name}.w_q"] = linear.w_q.cpu().contiguous()
        tensors[f"{name}.w_scale"] = linear.w_scale.cpu().contiguous()
    return tensors


def _current_exits(tower: nn.Module, made: Acceleration) -> Exits | None:
    """The exits with the classes that they look for now."""
    exits, router = made.exits, vision.exits_of(tower)
    if exits is None or router is None:
        return None
    classes = router.classes.cpu()
    had_none = one_class(next(iter(exits.heads.values())))
    if exits.classes is None and torch.equal(classes, had_none):
        return exits
    return replace(exits, classes=classes)


def _wrong_scale(tensors: dict[str, Tensor]) -> tuple[str, float] | None:
    """The first scale that is no step: NaN, infinite, zero or negative."""
    for name, tensor in tensors.items():
        if name.endswith(".w_scale"):
            is_wrong = ~((tensor > 0) & torch.isfinite(tensor))
            if is_wrong.any():
                return f"{name}[{int(is_wrong.nonzero()[0, 0])}]", float(tensor[is_wrong][0])
    return None


# Loading


def load(
    directory: str | os.PathLike[str], model: Model, *, backend: Backend | None = None
) -> Model:
    """The accelerated model that was saved, bit for bit, built from its float original.

    Nothing is quantized again, nothing unpickled. Hashes guard against damage and against other
    float weights; they are no signature: a checkpoint made by an attacker can hold any weights.

    Args:
      directory: where lraee.save wrote.
      model: the float model that was accelerated, text tower included; it stays as it is.
      backend: as in accelerate; None takes the one of the saved model.
    Raises: CheckpointError on files or float weights that are not those that were saved;
      TypeError, NotImplementedError, ValueError or RuntimeError as accelerate.
    """
    config = sealed.read_config(Path(directory), FORMAT)
    path, fields = config.path, _parse_fields(config.path, config.fields)
    backend = backend or fields.backend
    tower = checked_tower(model, replace(fields.scheme, keep_float=()), backend)
    base_hash = towers.tower_hash(tower.state_dict())
    if base_hash != fields.base_sha256:
        refuse(path, "base_sha256 must be that of the image tower of the given model", base_hash)
    shapes = _expected_shapes(path, tower, fields)
    tensors = sealed.read_tensors(config, shapes, source="the model and the scheme")
    wrong = _wrong_scale(tensors)
    if wrong is not None:
        refuse(config.weights_path, f"{wrong[0]} must be finite and above 0", wrong[1])
    exits = _parse_exits(path, fields, tensors)

    def saved(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        w_q, w_scale = tensors[f"{name}.w_q"], tensors[f"{name}.w_scale"]
        return w_q.to(weight.device), w_scale.to(weight.device)

    fast = assemble(
        model, scheme=fields.scheme, backend=backend, base_hash=base_hash, quantize=saved
    )
    if exits is not None:
        with refusing(path):
            add_exits(fast, exits)
    state_hash = towers.tower_hash(fast.state_dict())
    if state_hash != fields.state_sha256:
        rule = "state_sha256 must be that of the given model with these int8 weights"
        refuse(path, f"{rule} (another text tower?)", state_hash)
    return fast


def _parse_fields(path: Path, raw: dict[str, Any]) -> _Fields:
    for key in ("base_sha256", "state_sha256"):
        if not is_sha256(raw[key]):
            refuse(path, f"{key} must be 64 hexadecimal digits", raw[key])
    for name, text in require_keys(path, "versions", raw["versions"], _VERSIONS).items():
        if type(text) is not str:
            refuse(path, f"versions.{name} must be a string", text)
    if raw["backend"] not in get_args(Backend):
        refuse(path, f"backend must be one of {', '.join(get_args(Backend))}", raw["backend"])
    scheme = parse_options(path, "scheme", raw["scheme"], Scheme(), since=SINCE)
    hashes = raw["base_sha256"], raw["state_sha256"]
    return _Fields(scheme, raw["backend"], *hashes, raw["exits"])


def _expected_shapes(path: Path, tower: nn.Module, fields: _Fields) -> Shapes:
    """Type and shape of each tensor that the scheme makes of this tower, and of its exits."""
    scheme = fields.scheme
    unknown = set(scheme.keep_float) - set(towers.linear_shapes(tower))
    if unknown:
        refuse(path, "scheme.keep_float must name linears of the model", sorted(unknown))
    shapes: Shapes = {}
    for name, (N, K) in towers.int8_shapes(tower, scheme).items():
        shapes[f"{name}.w_q"] = (torch.int8, (N, K))
        shapes[f"{name}.w_scale"] = (torch.float32, (N,))
    own = {} if fields.exits is None else tensor_shapes(path, fields.exits)
    return shapes | {_EXITS + name: shape for name, shape in own.items()}


def _parse_exits(path: Path, fields: _Fields, tensors: dict[str, Tensor]) -> Exits | None:
    """The exits of this checkpoint, made for its own tower and scheme."""
    if fields.exits is None:
        return None
    own = {name for name in tensors if name.startswith(_EXITS)}
    exits = from_parts(
        path, fields.exits, {name.removeprefix(_EXITS): tensors[name] for name in own}, Exits
    )
    if exits.base_hash != fields.base_sha256:
        refuse(path, "exits.base_hash must be base_sha256", exits.base_hash)
    if exits.scheme != fields.scheme:
        refuse(path, "exits.scheme must be scheme", exits.scheme)
    return exits
