"""Long work in stages: what each made is kept in a folder, so that a run cut off goes on there."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lraee.files import CheckpointError, read_regular, replace_file

Tensors = dict[str, Tensor]
_MAX_BYTES = 1 << 40


class Stages:
    """Tensors by stage, in a folder of one run; without a folder every stage is made anew.

    Args:
      folder: made when missing; None keeps nothing.
      settings: all that the result depends on, as JSON. A folder of other settings is emptied.
    """

    def __init__(self, folder: Path | None, settings: object) -> None:
        """See the class."""
        self._folder = folder
        if folder is None:
            return
        text = json.dumps(settings, sort_keys=True).encode()
        key = hashlib.sha256(text).hexdigest()
        mark = folder / "run"
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            replace_file(mark, key.encode())

    def get(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What the stage made in a run before, or makes now; a damaged file is made again."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}.safetensors"
        try:
            return safetensors.torch.load(read_regular(path, _MAX_BYTES))
        except (CheckpointError, safetensors.SafetensorError):
            pass
        tensors = {key: tensor.contiguous() for key, tensor in make().items()}
        replace_file(path, safetensors.torch.save(tensors))
        return tensors

    def clear(self) -> None:
        """Removes the folder: the run is through."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
