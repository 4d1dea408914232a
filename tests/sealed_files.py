"""What tests of sealed directories share: both formats saved once, and files as attackers write."""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lraee
from lraee import CheckpointError
from lraee.exits import serialization
from lraee.exits.bundle import Exits
from lraee.model import checkpoint
from lraee.storage.sealed import Format
from tests.clip_models import make_model
from tests.exits.random_exits import make_exits

FORMATS = ("checkpoint", "exits")


@dataclass(frozen=True)
class Store:
    """One format: two saved files, another save of it, its loader, and what stands before the
    fields and the tensors of the exits.
    """

    form: Format
    config: bytes
    weights: bytes
    save: Callable[[Path], None]
    save_other: Callable[[Path], None]
    load: Callable[[Path], object]
    prefix: str

    def name(self, own: str) -> str:
        """Of a tensor: `classes`, a tensor of the head, or a full name."""
        if "." in own:
            return own
        return self.prefix + (own if own == "classes" else f"heads.1.{own}")

    def put(self, folder: Path, config: bytes | None = None, weights: bytes | None = None) -> Path:
        """Writes both files, the tensors under the name that the intact config gives them."""
        config = self.config if config is None else config
        weights = self.weights if weights is None else weights
        sha256 = json.loads(self.config)["weights_sha256"]
        if weights is not self.weights:
            sha256 = hashlib.sha256(weights).hexdigest()
            raw = {**json.loads(config), "weights_sha256": sha256, "weights_bytes": len(weights)}
            config = resealed(raw)
        folder.mkdir(exist_ok=True)
        (folder / self.form.config_name).write_bytes(config)
        path = folder / self.form.weights_name(sha256)
        path.write_bytes(weights)
        return path

    def expect_refusal(self, folder: Path, match: str) -> str:
        """Refused in one line that names the file, the rule and what to do."""
        with pytest.raises(CheckpointError, match=re.escape(match)) as caught:
            self.load(folder)
        line = str(caught.value)
        assert line.startswith(f"load: {folder}/") and "; " in line, line
        assert "\n" not in line and len(line) < 1200, line
        return line


def make_store(name: str, folder: Path) -> Store:
    torch.manual_seed(0)
    model = make_model(vision={"layers": 2, "width": 32})
    exits = make_exits(model, blocks=(1,))
    others = make_exits(model, blocks=(1,), num_classes=5)
    if name == "checkpoint":
        fast, other = (lraee.accelerate(model, exits=each) for each in (exits, others))
        form, prefix = checkpoint.FORMAT, "exits."
        save, save_other = partial(lraee.save, fast), partial(lraee.save, other)
        load: Callable[[Path], object] = partial(lraee.load, model=model)
    else:
        form, prefix = serialization.FORMAT, ""
        save, save_other, load = exits.save, others.save, Exits.load  # type: ignore[assignment]
    save(folder)
    (weights,) = folder.glob("*.safetensors")
    config = (folder / form.config_name).read_bytes()
    return Store(form, config, weights.read_bytes(), save, save_other, load, prefix)


def resealed(config: dict[str, Any]) -> bytes:
    """As a careful attacker would write it: with the right seal."""
    rest = {key: value for key, value in config.items() if key != "seal"}
    seal = hashlib.sha256((json.dumps(rest, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    return (json.dumps({**rest, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


# Hostile tensors


def packed(header: Any, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def unpacked(weights: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def retyped(weights: bytes, name: str, change: Callable[[Tensor], Tensor]) -> bytes:
    """A well-formed file in which one tensor was changed."""
    tensors = safetensors.torch.load(weights)
    tensors[name] = change(tensors[name])
    return safetensors.torch.save(tensors)


# Saves that are cut off


class Cut(Exception):
    """The power went out."""


def _call(function: Callable[..., Any], calls: Iterator[int], last: int, *arguments: Any) -> Any:
    if next(calls) == last:
        raise Cut
    return function(*arguments)


def cuts(monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> Iterator[None]:
    """Runs save again and again, cut off one call later each time, until it comes through.

    Yields after each that was cut off; the reader puts the old files back.
    """
    for last in range(1, 30):
        calls = count(1)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "unlink"):
                patch.setattr(os, name, partial(_call, getattr(os, name), calls, last))
            try:
                save()
            except Cut:
                yield
            else:
                return
    raise AssertionError("never finished")
