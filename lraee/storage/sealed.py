"""A directory with one JSON config and one safetensors file, read strictly, replaced in one step.

The config names the tensors' file by its hash and ends in a seal, the hash of all its rest. It is
replaced last, so that a save that is cut off leaves what was there before. Nothing is unpickled,
and every size, key, type, shape and hash is checked before it is used. Hashes guard against
damage; they are no signature: whoever wrote the files chose what is in them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lraee.storage.files import (
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

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor by name."""

_MAX_CONFIG_BYTES = 4 << 20
_MAX_HEADER_BYTES = 4 << 20
_DTYPES = {torch.int8: "I8", torch.float32: "F32"}  # as safetensors names them
_OWN_KEYS = {"format", "format_version", "weights_sha256", "weights_bytes", "tensors", "seal"}


@dataclass(frozen=True)
class Format:
    """One kind of such directories.

    Args:
      name, version: written into the config; no other is read.
      config_name: name of the config file.
      prefix: the tensors lie in `<prefix>-<hash>.safetensors`.
      saver: the function that writes it, for messages.
      fields: the keys of the config that belong to the caller.
    """

    name: str
    version: int
    config_name: str
    prefix: str
    saver: str
    fields: frozenset[str]

    def weights_name(self, sha256: str) -> str:
        """Name of the tensors' file with this hash."""
        return f"{self.prefix}-{sha256[:16]}.safetensors"


@dataclass(frozen=True)
class Config:
    """What a config says.

    Args:
      path: where it was read.
      fields: the caller's own, not checked yet.
      tensors: name -> [type, shape], not checked yet.
      weights_path, weights_sha256, weights_bytes: the tensors' file.
    """

    path: Path
    fields: dict[str, Any]
    tensors: Any
    weights_path: Path
    weights_sha256: str
    weights_bytes: int


# Writing


def write(
    directory: Path, form: Format, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Tensors first under a name of their own, then the config over the old one.

    Args:
      directory: made if it is not there; what this format wrote there before is replaced.
      form: the format.
      fields: JSON, as many as form.fields.
      tensors: int8 or float32, contiguous, in memory of their own.
    Raises: ValueError if the config would be too large to be read, or holds NaN or Inf.
    """
    assert set(fields) == form.fields
    weights = safetensors.torch.save(dict(tensors))
    config = {
        **fields,
        "format": form.name,
        "format_version": form.version,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "tensors": listed({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}),
    }
    text = render({**config, "seal": seal(config)})
    if len(text) > _MAX_CONFIG_BYTES:
        rule = f"{form.config_name} must be of at most {_MAX_CONFIG_BYTES} bytes"
        raise ValueError(f"save: {rule}, got {len(text)}")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        before = read_config(directory, form).weights_path
    except CheckpointError:
        before = None
    path = directory / form.weights_name(config["weights_sha256"])
    replace_file(path, weights)
    replace_file(directory / form.config_name, text)
    if before is not None and before != path:
        before.unlink(missing_ok=True)


def render(value: object) -> bytes:
    """The one way in which JSON is written here; a config in any other bytes is refused.

    Raises: ValueError, TypeError or RecursionError on what JSON cannot hold.
    """
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def seal(config: dict[str, Any]) -> str:
    """sha256 of all the rest of the config."""
    rest = {key: value for key, value in config.items() if key != "seal"}
    return hashlib.sha256(render(rest)).hexdigest()


def listed(shapes: Shapes) -> dict[str, list[Any]]:
    """As the config lists tensors."""
    return {name: [_DTYPES[dtype], list(shape)] for name, (dtype, shape) in shapes.items()}


# Reading


def read_config(directory: Path, form: Format) -> Config:
    """The config of this directory, whole as it was written.

    Raises: CheckpointError on any other.
    """
    path = directory / form.config_name
    data = read_regular(path, _MAX_CONFIG_BYTES)
    raw = parse_json(path, data)
    if raw.get("format") != form.name:
        refuse(path, f"format must be {form.name!r}", raw.get("format"))
    number = raw.get("format_version")
    if type(number) is not int or number != form.version:
        rule = f"format_version must be {form.version}, the one that this lraee reads"
        refuse(path, rule, number)
    require_keys(path, "the object", raw, form.fields | _OWN_KEYS)
    try:
        is_intact = render(raw) == data and raw["seal"] == seal(raw)
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        refuse(
            path, f"seal must be the sha256 of all the rest, as {form.saver} writes it", "another"
        )
    sha256, size = raw["weights_sha256"], raw["weights_bytes"]
    if not is_sha256(sha256):
        refuse(path, "weights_sha256 must be 64 hexadecimal digits", sha256)
    if type(size) is not int or size < 8:
        refuse(path, "weights_bytes must be an integer of at least 8", size)
    fields = {key: raw[key] for key in form.fields}
    weights_path = path.with_name(form.weights_name(sha256))
    return Config(path, fields, raw["tensors"], weights_path, sha256, size)


def read_tensors(config: Config, shapes: Shapes, *, source: str) -> dict[str, Tensor]:
    """The tensors that this config belongs to.

    Args:
      config: from read_config.
      shapes: of all tensors that must be there; the file is read only if the config lists these.
      source: what the shapes follow from, for messages.
    Raises: CheckpointError on any others.
    """
    if not is_same_json(config.tensors, listed(shapes)):
        refuse(config.path, f"tensors must be those of {source}", config.tensors)
    path = config.weights_path
    data = read_regular(path, size_bytes(shapes) + _MAX_HEADER_BYTES)
    if len(data) != config.weights_bytes:
        refuse(path, f"must be of {config.weights_bytes} bytes", len(data))
    found = hashlib.sha256(data).hexdigest()
    if found != config.weights_sha256:
        refuse(path, f"must have sha256 {config.weights_sha256}", found)
    _check_header(path, data, shapes)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"load: {path}: must be safetensors, got {short(str(error))}"
        ) from error


def size_bytes(shapes: Shapes) -> int:
    """Of the numbers of all these tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def _check_header(path: Path, data: bytes, shapes: Shapes) -> None:
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        refuse(path, "must hold its header whole", size)
    header = parse_json(path, data[8 : 8 + size])
    require_keys(path, "the header", header, shapes)
    for name, expected in listed(shapes).items():
        entry = require_keys(path, name, header[name], ("dtype", "shape", "data_offsets"))
        stored = [entry["dtype"], entry["shape"]]
        if not is_same_json(stored, expected):
            refuse(path, f"{name} must be {expected[0]} {expected[1]}", stored)
