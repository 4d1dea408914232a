"""Saves the int8 weights of an accelerated model, and builds the same model from them again.

A checkpoint is a directory with two files: `int8-<hash>.safetensors`, w_q and w_scale of each
quantized linear, and `lraee.json`, which says how to read it. All that stays float comes from the
float model; its hash is in the file. `lraee.json` names the weights by their hash and is replaced
last, in one step, so that a save that is cut off leaves the checkpoint that was there before.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from lraee import towers
from lraee.accelerate import acceleration_of, assemble, checked_tower
from lraee.backend import Backend
from lraee.files import (
    CheckpointError,
    is_same_json,
    is_sha256,
    parse_json,
    read_regular,
    refuse,
    replace_file,
    require_keys,
    short,
)
from lraee.linear import Int8Linear
from lraee.quantize import Scheme

Model = TypeVar("Model", bound=nn.Module)
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

FORMAT, FORMAT_VERSION = "lraee int8 checkpoint", 1
CONFIG_NAME = "lraee.json"

_MAX_CONFIG_BYTES = 4 << 20
_MAX_HEADER_BYTES = 4 << 20
_DTYPES = {torch.int8: "I8", torch.float32: "F32"}  # as safetensors names them
_VERSIONS = ("lraee", "torch", "open_clip_torch")
_KEYS = {
    "format", "format_version", "versions", "scheme", "backend", "base_sha256", "state_sha256",
    "weights_sha256", "weights_bytes", "tensors", "seal",
}  # fmt: skip


@dataclass(frozen=True)
class _Config:
    """What lraee.json says, each value of the right type.

    Args:
      base_sha256: towers.tower_hash of the float tower.
      state_sha256: the same hash of the whole accelerated model.
      weights_sha256, weights_bytes: of the safetensors file.
      tensors: name -> [type, shape], not compared with a model yet.
    """

    scheme: Scheme
    backend: Backend
    base_sha256: str
    state_sha256: str
    weights_sha256: str
    weights_bytes: int
    tensors: Any

    @property
    def weights_name(self) -> str:
        return _weights_name(self.weights_sha256)


# Saving


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the int8 weights of an accelerated model; load builds the same model from them.

    Args:
      model: from lraee.accelerate or lraee.load, in the float type it was accelerated in.
      directory: made if it is not there; a checkpoint in it is replaced in one step.
    Raises: ValueError if the model is not accelerated, was cast, or has scales that load refuses.
    """
    made = acceleration_of(model)
    if made is None:
        raise ValueError("save: model must be accelerated, got a float one")
    tower = towers.find_tower(model)
    for block, skeleton in zip(towers.blocks_of(tower), made.skeletons, strict=True):
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
    weights = safetensors.torch.save(tensors)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in _VERSIONS},
        "scheme": asdict(made.scheme),
        "backend": made.backend,
        "base_sha256": made.base_hash,
        "state_sha256": towers.tower_hash(model.state_dict()),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "tensors": _listed({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}),
    }
    _write(Path(directory), config, weights)


def _tensors_of(tower: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, module in towers.blocks_of(tower).named_modules(prefix="resblocks"):
        if isinstance(module, Int8Linear):
            tensors[f"{name}.w_q"] = module.w_q.cpu().contiguous()
            tensors[f"{name}.w_scale"] = module.w_scale.cpu().contiguous()
    return tensors


def _wrong_scale(tensors: dict[str, Tensor]) -> tuple[str, float] | None:
    """The first scale that is no step: NaN, infinite, zero or negative."""
    for name, tensor in tensors.items():
        if name.endswith(".w_scale"):
            is_wrong = ~((tensor > 0) & torch.isfinite(tensor))
            if is_wrong.any():
                return f"{name}[{int(is_wrong.nonzero()[0, 0])}]", float(tensor[is_wrong][0])
    return None


def _listed(shapes: Shapes) -> dict[str, list[Any]]:
    return {name: [_DTYPES[dtype], list(shape)] for name, (dtype, shape) in shapes.items()}


def _write(directory: Path, config: dict[str, Any], weights: bytes) -> None:
    """Weights first under a name of their own, then the config over the old one."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        before = _read_config(directory / CONFIG_NAME).weights_name
    except CheckpointError:
        before = None
    name = _weights_name(config["weights_sha256"])
    replace_file(directory / name, weights)
    replace_file(directory / CONFIG_NAME, _render({**config, "seal": _seal(config)}))
    if before not in (None, name):
        (directory / str(before)).unlink(missing_ok=True)


def _weights_name(sha256: str) -> str:
    return f"int8-{sha256[:16]}.safetensors"


def _render(config: dict[str, Any]) -> bytes:
    """The one way in which lraee.json is written; any other bytes are refused."""
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode("ascii")


def _seal(config: dict[str, Any]) -> str:
    """sha256 of all the rest of lraee.json."""
    rest = {key: value for key, value in config.items() if key != "seal"}
    return hashlib.sha256(_render(rest)).hexdigest()


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
    path = Path(directory) / CONFIG_NAME
    config = _read_config(path)
    backend = backend or config.backend
    tower = checked_tower(model, replace(config.scheme, keep_float=()), backend)
    base_hash = towers.tower_hash(tower.state_dict())
    if base_hash != config.base_sha256:
        refuse(path, "base_sha256 must be that of the image tower of the given model", base_hash)
    shapes = _expected_shapes(path, tower, config.scheme)
    if not is_same_json(config.tensors, _listed(shapes)):
        refuse(path, "tensors must be those of the model and the scheme", config.tensors)
    tensors = _read_weights(path.with_name(config.weights_name), config, shapes)

    def saved(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        w_q, w_scale = tensors[f"{name}.w_q"], tensors[f"{name}.w_scale"]
        return w_q.to(weight.device), w_scale.to(weight.device)

    fast = assemble(
        model, scheme=config.scheme, backend=backend, base_hash=base_hash, quantize=saved
    )
    state_hash = towers.tower_hash(fast.state_dict())
    if state_hash != config.state_sha256:
        rule = "state_sha256 must be that of the given model with these int8 weights"
        refuse(path, f"{rule} (another text tower?)", state_hash)
    return fast


def _read_config(path: Path) -> _Config:
    data = read_regular(path, _MAX_CONFIG_BYTES)
    raw = parse_json(path, data)
    if raw.get("format") != FORMAT:
        refuse(path, f"format must be {FORMAT!r}", raw.get("format"))
    number = raw.get("format_version")
    if type(number) is not int or number != FORMAT_VERSION:
        rule = f"format_version must be {FORMAT_VERSION}, the one that this lraee reads"
        refuse(path, rule, number)
    require_keys(path, "the object", raw, _KEYS)
    try:
        is_intact = _render(raw) == data and raw["seal"] == _seal(raw)
    except RecursionError:
        is_intact = False
    if not is_intact:
        refuse(path, "seal must be the sha256 of all the rest, as lraee.save writes it", "another")
    for key in ("base_sha256", "state_sha256", "weights_sha256"):
        if not is_sha256(raw[key]):
            refuse(path, f"{key} must be 64 hexadecimal digits", raw[key])
    for name, text in require_keys(path, "versions", raw["versions"], _VERSIONS).items():
        if type(text) is not str:
            refuse(path, f"versions.{name} must be a string", text)
    if type(raw["weights_bytes"]) is not int or raw["weights_bytes"] < 8:
        refuse(path, "weights_bytes must be an integer of at least 8", raw["weights_bytes"])
    if raw["backend"] not in get_args(Backend):
        refuse(path, f"backend must be one of {', '.join(get_args(Backend))}", raw["backend"])
    return _Config(
        scheme=_parse_scheme(path, raw["scheme"]),
        **{f.name: raw[f.name] for f in fields(_Config) if f.name != "scheme"},
    )


def _parse_scheme(path: Path, value: object) -> Scheme:
    defaults = vars(Scheme())
    raw = dict(require_keys(path, "scheme", value, defaults))
    for name, default in defaults.items():
        wanted = list if type(default) is tuple else type(default)
        if type(raw[name]) is not wanted:
            refuse(path, f"scheme.{name} must be of type {wanted.__name__}", raw[name])
        if wanted is list:
            if not all(type(element) is str for element in raw[name]):
                refuse(path, f"scheme.{name} must hold strings", raw[name])
            raw[name] = tuple(raw[name])
    try:
        return Scheme(**raw)
    except ValueError as error:
        raise CheckpointError(f"load: {path}: {error}") from error


def _expected_shapes(path: Path, tower: nn.Module, scheme: Scheme) -> Shapes:
    """Type and shape of each tensor that the scheme makes of this tower."""
    linears = towers.linear_shapes(tower)
    unknown = set(scheme.keep_float) - set(linears)
    if unknown:
        refuse(path, "scheme.keep_float must name linears of the model", sorted(unknown))
    shapes: Shapes = {}
    for name, (N, K) in linears.items():
        if name not in scheme.keep_float:
            shapes[f"{name}.w_q"] = (torch.int8, (N, K))
            shapes[f"{name}.w_scale"] = (torch.float32, (N,))
    return shapes


def _read_weights(path: Path, config: _Config, shapes: Shapes) -> dict[str, Tensor]:
    numel = {name: torch.Size(shape).numel() for name, (_, shape) in shapes.items()}
    content_bytes = sum(numel[name] * dtype.itemsize for name, (dtype, _) in shapes.items())
    data = read_regular(path, content_bytes + _MAX_HEADER_BYTES)
    if len(data) != config.weights_bytes:
        refuse(path, f"must be of {config.weights_bytes} bytes", len(data))
    found = hashlib.sha256(data).hexdigest()
    if found != config.weights_sha256:
        refuse(path, f"must have sha256 {config.weights_sha256}", found)
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        refuse(path, "must hold its header whole", size)
    header = parse_json(path, data[8 : 8 + size])
    require_keys(path, "the header", header, shapes)
    for name, (dtype, shape) in shapes.items():
        entry = require_keys(path, name, header[name], ("dtype", "shape", "data_offsets"))
        stored = [entry["dtype"], entry["shape"]]
        if not is_same_json(stored, [_DTYPES[dtype], list(shape)]):
            refuse(path, f"{name} must be {_DTYPES[dtype]} {list(shape)}", stored)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"load: {path}: must be safetensors, got {short(str(error))}"
        ) from error
    wrong = _wrong_scale(tensors)
    if wrong is not None:
        refuse(path, f"{wrong[0]} must be finite and above 0", wrong[1])
    return tensors
