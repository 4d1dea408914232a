"""Long work in stages: what each made is kept in a folder, so that a run cut off goes on there."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lraee.storage import spill
from lraee.storage.files import open_file, read_file, replace_file
from lraee.storage.schema import is_digest

Tensors = dict[str, Tensor]
_MAX_BYTES = 1 << 40
_MARK = "run"
_STAGE = ".safetensors"
_CUT_OFF = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""What replace_file leaves where it was cut off."""


class Stages:
    """Tensors by stage, in a folder of one run; without a folder every stage is made anew.

    Args:
      folder: made when missing; None keeps nothing.
      settings: all that the result depends on, as JSON. Stages of other settings are removed.
    Raises: ValueError on a folder with files that no run left there; they are not touched.
    """

    def __init__(self, folder: Path | None, settings: object) -> None:
        """See the class."""
        self._folder = folder
        if folder is None:
            return
        text = json.dumps(settings, sort_keys=True).encode()
        key = hashlib.sha256(text).hexdigest()
        _require_own(folder)
        if _key_of(folder) != key:
            _remove_stages(folder)  # before the new mark: no stage may pass for one of this run
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / _MARK, key.encode())

    def get(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What the stage made in a run before, or makes now; a damaged file is made again."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}{_STAGE}"
        try:
            return _mapped(path)
        except (OSError, ValueError, safetensors.SafetensorError):
            pass
        replace_file(path, _parts({key: tensor.contiguous() for key, tensor in make().items()}))
        return _mapped(path)

    def clear(self) -> None:
        """Removes the folder: the run is through. Files that are not of the run stay in it."""
        if self._folder is not None:
            _remove_stages(self._folder)
            with suppress(OSError):
                (self._folder / _MARK).unlink()
                self._folder.rmdir()


def _mapped(path: Path) -> Tensors:
    """The tensors of a stage; large ones stay in the file, and are read where they are used.

    Raises: OSError, ValueError, SafetensorError on anything but a whole file.
    """
    with open_file(path, _MAX_BYTES):
        pass  # no pipe, no device
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: tensor if tensor.nbytes > spill.IN_MEMORY_BYTES else tensor.clone()
        for name, tensor in tensors.items()
    }


def _parts(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts: its header, then each tensor where it lies, without a copy."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = _KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.nbytes:
            yield tensor.cpu().view(-1).view(torch.uint8).numpy().data


_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the format."""


def _key_of(folder: Path) -> str | None:
    """The settings of the run that left this folder; None if no run did."""
    try:
        text = read_file(folder / _MARK, 64).decode("ascii", "replace")
    except (OSError, ValueError):
        return None
    return text if is_digest(text) else None


def _require_own(folder: Path) -> None:
    """Raises ValueError unless the folder is new, empty, or what a run left."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"calibrate: folder must be a folder, got the file {folder}")
    if not folder.is_dir() or _key_of(folder) is not None:
        return
    for path in folder.iterdir():
        if not _CUT_OFF.fullmatch(path.name):
            raise ValueError(
                "calibrate: folder must be new, empty, or left by a run cut off, got"
                f" {folder} with {path.name} in it"
            )


def _remove_stages(folder: Path) -> None:
    """Removes what a run wrote, its mark aside."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_file() and (path.suffix == _STAGE or _CUT_OFF.fullmatch(path.name)):
                path.unlink()
