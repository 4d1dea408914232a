"""A directory with one JSON config and one safetensors file, read strictly, replaced in one step.

The config names the tensors' file by its hash and ends in a seal, the hash of all its rest; it is
replaced last, so that a save that is cut off leaves what was there before. Hashes guard against
damage; they are no signature. Reading follows symbolic links, writing replaces them; nothing is
unpickled. See docs/checkpoint-format.md.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lraee.storage import folder, schema
from lraee.storage.files import open_file, read_file, refusing, replace_file, require
from lraee.storage.json import parse, read_json, render
from lraee.storage.schema import Kind, Specs

_MAX_BYTES = 4 << 20  # of a config, and of a header
_OWN: dict[str, Kind] = {
    "weights_sha256": schema.DIGEST,
    "weights_bytes": schema.integer(0, 1 << 50),
    "tensors": schema.scalar("an object", lambda value: type(value) is dict),
}


@dataclass(frozen=True)
class Format:
    """One kind of such directories.

    Args:
      name, version: written into the config; no other is read.
      config_name: name of the config file.
      prefix: the tensors lie in `<prefix>-<first 16 digits of their hash>.safetensors`.
      saver: the function that writes it, for messages.
      fields: the keys of the config that belong to the caller.
      since: values of those keys that older files lack.
    """

    name: str
    version: int
    config_name: str
    prefix: str
    saver: str
    fields: Mapping[str, Kind]
    since: Mapping[str, Any] = field(default_factory=dict)

    def weights_name(self, sha256: str) -> str:
        """Name of the tensors' file with this hash."""
        return f"{self.prefix}-{sha256[:16]}.safetensors"

    def refusing(self, path: Path) -> AbstractContextManager[None]:
        """Turns ValueError and OSError of the block into a CheckpointError about this file."""
        return refusing(path, f"copy the folder again, or write it again with {self.saver}")

    def check(self, text: bytes) -> dict[str, Any]:
        """The fields of a config, checked and built; those of this module too.

        Raises: ValueError naming the field, the rule and the value.
        """
        rule = f"{self.config_name} must be of at most {_MAX_BYTES} bytes"
        require(len(text) <= _MAX_BYTES, rule, len(text))
        rest = parse(text)
        name, number, seal = (rest.pop(key, None) for key in ("format", "format_version", "seal"))
        require(name == self.name, f"format must be {self.name!r}", name)
        is_newer = type(number) is int and number > self.version
        advice = "upgrade lraee" if is_newer else f"write it again with the {self.saver} of now"
        is_own = type(number) is int and number == self.version
        rule = f"format_version must be {self.version}, the one that this lraee reads"
        require(is_own, rule, number, advice)
        rule = f"seal must be the sha256 of all the rest, as {self.saver} writes it"
        require(self.sealed(rest) == text, rule, seal)
        return schema.record({**self.fields, **_OWN}, since=self.since)(rest, "")  # type: ignore[no-any-return]

    def sealed(self, fields: Mapping[str, Any]) -> bytes:
        """The text of a config: its fields, the format, and the sha256 of both as `seal`."""
        config = {**fields, "format": self.name, "format_version": self.version}
        return render({**config, "seal": hashlib.sha256(render(config)).hexdigest()})


# Writing


def own_copy(tensor: Tensor) -> Tensor:
    """In contiguous memory of its own on the CPU, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def write(
    directory: Path,
    form: Format,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    specs_of: Callable[[dict[str, Any]], Specs],
) -> None:
    """Tensors first under a name of their own, then the config over the old one.

    Args:
      directory: made if it is not there; what this format wrote there before is replaced.
      form: the format.
      fields: JSON, as form.fields declares them.
      tensors: from own_copy.
      specs_of: what the tensors must be, from the checked fields.
    Raises: ValueError on what would not be read again, OSError where the files cannot be written;
      what was there before is whole then.
    """
    try:
        weights = safetensors.torch.save(dict(tensors))
        sha256 = hashlib.sha256(weights).hexdigest()
        own = {"weights_sha256": sha256, "weights_bytes": len(weights)}
        text = form.sealed({**fields, **own, "tensors": schema.listed(tensors)})
        schema.check_tensors(specs_of(form.check(text)), tensors)
    except ValueError as error:
        raise ValueError(f"save: {error}") from error
    path = directory / form.weights_name(sha256)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with folder.in_use(directory) as handle:
            try:
                replace_file(path, weights)
                path = directory / form.config_name
                replace_file(path, text)
            finally:
                with suppress(OSError, ValueError):  # what is not removed now is so later
                    if folder.is_alone(directory, handle):
                        _remove_unused(directory, form)
    except OSError as error:
        line = f"save: {path} must be writable, got {error.strerror}"
        refusal = OSError(f"{line}; free space there, or save to another folder")
        refusal.errno = error.errno
        raise refusal from error


def _remove_unused(directory: Path, form: Format) -> None:
    """Removes what saves before left."""
    keep = {form.config_name}
    with suppress(FileNotFoundError):
        config = read_json(directory / form.config_name, _MAX_BYTES)
        keep.add(form.weights_name(config["weights_sha256"]))
    names = rf"{re.escape(form.config_name)}|{form.prefix}-[0-9a-f]{{16}}\.safetensors"
    folder.remove_others(directory, names, keep)


# Reading


@dataclass(frozen=True)
class Saved:
    """The checked fields of a config, where it lies, and the way to its tensors."""

    form: Format
    path: Path
    fields: dict[str, Any]

    def refusing(self) -> AbstractContextManager[None]:
        """Turns ValueError of the block into a CheckpointError about the config."""
        return self.form.refusing(self.path)

    def tensors(self, specs: Specs) -> dict[str, Tensor]:
        """The tensors of this config; their file is opened only if the config lists the specs.

        Raises: CheckpointError on any others.
        """
        with self.refusing():
            schema.require_same("tensors", self.fields["tensors"], schema.listed(specs))
        path = self.path.with_name(self.form.weights_name(self.fields["weights_sha256"]))
        with self.form.refusing(path):
            tensors = safetensors.torch.load(self._read(path, specs))
            schema.check_tensors(specs, tensors)
        return tensors

    def _read(self, path: Path, specs: Specs) -> bytes:
        """The bytes of the file; its header is checked before the rest is read."""
        sha256, size = self.fields["weights_sha256"], self.fields["weights_bytes"]
        content = sum(spec.size_bytes for spec in specs.values())
        with open_file(path, content + _MAX_BYTES) as (file, stored):
            require(stored == size, f"must be of {size} bytes", stored)
            data = file.read(8)
            header_size = int.from_bytes(data, "little")
            is_right = header_size == size - 8 - content
            require(is_right, f"header must be of {size - 8 - content} bytes", header_size)
            data += file.read(header_size)
            header = parse(data[8:])
            # those of the file as they lie in it, then what it lacks
            order = [name for name in {**header, **specs} if name in specs]
            schema.require_same("header", header, schema.header(specs, order))
            data += file.read(content)
        result = hashlib.sha256(data).hexdigest()
        require(result == sha256, f"must have sha256 {sha256}", result)
        return data


@contextmanager
def opened(directory: Path, form: Format) -> Iterator[Saved]:
    """The files of this directory, which no save removes while they are read.

    Raises: CheckpointError on any that are not of this format.
    """
    path = directory / form.config_name
    with folder.in_use(directory):
        with form.refusing(path):
            saved = Saved(form, path, form.check(read_file(path, _MAX_BYTES)))
        yield saved
