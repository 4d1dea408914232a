"""Results of the sweep: lines of JSON, each written at once and keyed by what it holds for."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = Path(__file__).parents[2] / "kernels"
DATA = ("measured.py",)
"""Files that results are folded into: they are no part of what a result holds for."""


class Key(NamedTuple):
    """What a line holds for; a line with the same key need not be measured again."""

    kernels: str
    triton: str
    gpu: str
    step: str
    shape: str
    variant: str


def kernels_hash() -> str:
    """sha256 of the kernels' sources without their measured data, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        if path.name not in DATA:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a file of results; a line that is none, such as one cut off, is left out.

    No line where there is no file.
    """
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(isinstance(line.get(name), str) for name in Key._fields):
            yield line


def key_of(line: Mapping[str, Any]) -> Key:
    """Of a line that read_lines gave."""
    return Key(*(line[name] for name in Key._fields))


class Results:
    """Where lines go, and which are there already.

    Args:
      path: lines are added to this file.
      kernels, triton, gpu: of every line of this run.
      before: files whose lines need not be measured again.
    """

    def __init__(
        self, path: Path, kernels: str, triton: str, gpu: str, before: tuple[Path, ...] = ()
    ) -> None:
        """See the class."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._header = path, (kernels, triton, gpu)
        lines = [line for each in (*before, path) for line in read_lines(each)]
        # What failed is tried again
        self._keys = {key_of(line) for line in lines if "error" not in line}
        self.written = 0

    def has(self, step: str, shape: str, variant: str) -> bool:
        """Whether this was measured with these kernels, this Triton and this GPU."""
        return Key(*self._header, step, shape, variant) in self._keys

    def write(self, step: str, shape: str, variant: str, values: Mapping[str, Any]) -> None:
        """Adds one line, which is on the disk when this returns.

        Raises: ValueError on NaN and Inf.
        """
        key = Key(*self._header, step, shape, variant)
        text = json.dumps({**key._asdict(), **values}, allow_nan=False)
        with self._path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if "error" not in values:
            self._keys.add(key)
        self.written += 1
