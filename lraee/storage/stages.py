"""Long work in stages: what each made is kept in a folder, so that a run cut off goes on there."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lraee.storage.files import read_file, replace_file
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
            return safetensors.torch.load(read_file(path, _MAX_BYTES))
        except (OSError, ValueError, safetensors.SafetensorError):
            pass
        tensors = {key: tensor.contiguous() for key, tensor in make().items()}
        replace_file(path, safetensors.torch.save(tensors))
        return tensors

    def clear(self) -> None:
        """Removes the folder: the run is through. Files that are not of the run stay in it."""
        if self._folder is not None:
            _remove_stages(self._folder)
            with suppress(OSError):
                (self._folder / _MARK).unlink()
                self._folder.rmdir()


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
