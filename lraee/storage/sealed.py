"""A directory with one JSON config and one safetensors file, read strictly, replaced in one step.

The config names the tensors' file by its hash and ends in a seal, the hash of all its rest; it is
replaced last, so that a save that is cut off leaves what was there before. Hashes guard against
damage; they are no signature. Reading follows symbolic links, writing replaces them; nothing is
unpickled. See docs/checkpoint-format.md.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lraee.storage import schema
from lraee.storage.files import open_file, read_file, refusing, replace_file, require
from lraee.storage.json import parse, read_json, render
from lraee.storage.schema import DIGEST, Items, Kind, Record, Specs, check, integer

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

_MAX_BYTES = 4 << 20  # of a config, and of a header
_SIZE = integer(0, 1 << 50)
_OWN: dict[str, Kind] = {
    "weights_sha256": DIGEST,
    "weights_bytes": _SIZE,
    "tensors": schema.Scalar("an object", lambda value: type(value) is dict),
}
_HEADER_ENTRY = Record(
    {"dtype": schema.STRING, "shape": Items(_SIZE, 0, 8), "data_offsets": Items(_SIZE, 2, 2)}
)
_NAMES = {dtype: name for name, dtype in schema.DTYPES.items()}
_log = logging.getLogger("lraee")


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

    @property
    def advice(self) -> str:
        """What to do about a file that is refused."""
        return f"copy the folder again, or write it again with {self.saver}"

    def weights_name(self, sha256: str) -> str:
        """Name of the tensors' file with this hash."""
        return f"{self.prefix}-{sha256[:16]}.safetensors"

    def check(self, text: bytes) -> dict[str, Any]:
        """The fields of a config, checked and built; those of this module too.

        Raises: ValueError naming the field, the rule and the value.
        """
        rule = f"{self.config_name} must be of at most {_MAX_BYTES} bytes"
        require(len(text) <= _MAX_BYTES, rule, len(text))
        rest = parse(text)
        name, number = rest.pop("format", None), rest.pop("format_version", None)
        require(name == self.name, f"format must be {self.name!r}", name)
        is_newer = type(number) is int and number > self.version
        advice = "upgrade lraee" if is_newer else f"write it again with the {self.saver} of now"
        is_known = type(number) is int and number == self.version
        rule = f"format_version must be {self.version}, the one that this lraee reads"
        require(is_known, rule, number, advice)
        seal = rest.pop("seal", None)
        rule = f"seal must be the sha256 of all the rest, as {self.saver} writes it"
        require(self.sealed(rest) == text, rule, seal)
        return check(Record({**self.fields, **_OWN}, since=self.since), rest)  # type: ignore[no-any-return]

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
        listed = {name: [_NAMES.get(t.dtype), list(t.shape)] for name, t in tensors.items()}
        own = {"weights_sha256": sha256, "weights_bytes": len(weights), "tensors": listed}
        text = form.sealed({**fields, **own})
        schema.check_tensors(specs_of(form.check(text)), tensors)
    except ValueError as error:
        raise ValueError(f"save: {error}") from error
    path = directory / form.weights_name(sha256)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _in_use(directory) as handle:
            try:
                replace_file(path, weights)
                path = directory / form.config_name
                replace_file(path, text)
            finally:
                with suppress(OSError, ValueError):  # what is not removed now is so later
                    _remove_unused(directory, form, handle)
    except OSError as error:
        line = f"save: {path} must be writable, got {error.strerror}"
        refusal = OSError(f"{line}; free space there, or save to another folder")
        refusal.errno = error.errno
        raise refusal from error


@contextmanager
def _in_use(directory: Path) -> Iterator[int | None]:
    """Holds the folder's shared lock, under which no other process removes files.

    Yields None where there is no lock; then nothing is removed.
    """
    with ExitStack() as stack:
        locked = None
        with suppress(OSError):  # some network mounts, and a folder that is not there
            if fcntl:
                handle = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH)
                locked = handle
        yield locked


def _remove_unused(directory: Path, form: Format, handle: int | None) -> None:
    """Removes what saves before left, if no other process uses the folder now."""
    if handle is None:
        _log.warning("save: %s cannot be locked: older tensors in it stay", directory)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # the last of these processes does it
    except OSError:  # NFS gives this lock to files alone
        return _remove_unused(directory, form, None)
    try:
        sha256 = read_json(directory / form.config_name, _MAX_BYTES)["weights_sha256"]
    except FileNotFoundError:
        sha256 = ""
    weights = rf"{form.prefix}-[0-9a-f]{{16}}\.safetensors"
    temporary = rf"\.({re.escape(form.config_name)}|{weights})\.[0-9a-f]{{16}}\.tmp"
    for path in directory.iterdir():
        is_own = re.fullmatch(f"{weights}|{temporary}", path.name)
        if is_own and path.name != form.weights_name(sha256):
            path.unlink()


# Reading


@dataclass(frozen=True)
class Saved:
    """The checked fields of a config, where it lies, and the way to its tensors."""

    form: Format
    path: Path
    fields: dict[str, Any]

    def refusing(self) -> AbstractContextManager[None]:
        """Turns ValueError of the block into a CheckpointError about the config."""
        return refusing(self.path, self.form.advice)

    def tensors(self, specs: Specs) -> dict[str, Tensor]:
        """The tensors of this config; their file is opened only if the config lists the specs.

        Raises: CheckpointError on any others.
        """
        listed = self.fields["tensors"]
        expected = {name: [spec.dtype, list(spec.shape)] for name, spec in specs.items()}
        with self.refusing():
            rule = "tensors must be those of the model and the settings"
            wrong = {*listed, *expected}
            wrong = {n for n in wrong if render(listed.get(n)) != render(expected.get(n))}
            require(not wrong, rule, {name: listed.get(name) for name in sorted(wrong)})
        path = self.path.with_name(self.form.weights_name(self.fields["weights_sha256"]))
        with refusing(path, self.form.advice):
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
            _check_header(parse(data[8:]), specs)
            data += file.read(content)
        result = hashlib.sha256(data).hexdigest()
        require(result == sha256, f"must have sha256 {sha256}", result)
        return data


def _check_header(header: dict[str, Any], specs: Specs) -> None:
    """Exactly these tensors, one behind the other without a gap."""
    entries = check(Record(dict.fromkeys(specs, _HEADER_ENTRY)), header, "header")
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        spec = specs[name]
        stored = (entry["dtype"], entry["shape"])
        is_right = stored == (spec.dtype, tuple(spec.shape))
        require(is_right, f"{name} must be {spec.dtype} {list(spec.shape)}", stored)
        end = offset + spec.size_bytes
        is_right = entry["data_offsets"] == (offset, end)
        require(is_right, f"{name} must lie at {offset} to {end}", entry["data_offsets"])
        offset = end


@contextmanager
def opened(directory: Path, form: Format) -> Iterator[Saved]:
    """The files of this directory, which no save removes while they are read.

    Raises: CheckpointError on any that are not of this format.
    """
    path = directory / form.config_name
    with _in_use(directory):
        with refusing(path, form.advice):
            saved = Saved(form, path, form.check(read_file(path, _MAX_BYTES)))
        yield saved
