"""What tests of sealed directories share: writing them as an attacker would, and saves cut off."""

import hashlib
import json
import os
import pickle
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
from torch import Tensor

from lraee.storage import sealed
from lraee.storage.files import CheckpointError
from lraee.storage.sealed import Format

Edit = Callable[[dict[str, Any]], object]
Rewrite = Callable[[dict[str, Any], bytes], bytes]


class Files(NamedTuple):
    """The two files of a sealed directory."""

    config: bytes
    weights: bytes


def read_files(folder: Path, form: Format) -> Files:
    (weights,) = folder.glob("*.safetensors")
    return Files((folder / form.config_name).read_bytes(), weights.read_bytes())


def weights_name(form: Format, config: bytes) -> str:
    return form.weights_name(json.loads(config)["weights_sha256"])


def put(
    folder: Path, form: Format, config: bytes, weights: bytes, name: str | None = None
) -> tuple[Path, Path]:
    """Writes both files; the weights under the name that the config gives them, or another."""
    paths = folder / form.config_name, folder / (name or weights_name(form, config))
    paths[0].write_bytes(config)
    paths[1].write_bytes(weights)
    return paths


def resealed(config: dict[str, Any]) -> bytes:
    """As a careful attacker would write it: with the right seal."""
    text = json.dumps({**config, "seal": seal_of(config)}, indent=1, sort_keys=True)
    return (text + "\n").encode()


def seal_of(config: dict[str, Any]) -> str:
    """The seal, of configs too that are never written."""
    rest = {key: value for key, value in config.items() if key != "seal"}
    return hashlib.sha256((json.dumps(rest, indent=1, sort_keys=True) + "\n").encode()).hexdigest()


def adapted(config: bytes, weights: bytes) -> dict[str, Any]:
    """The config with size and hash of these weights."""
    sha256 = hashlib.sha256(weights).hexdigest()
    return {**json.loads(config), "weights_sha256": sha256, "weights_bytes": len(weights)}


def rewritten(files: Files, rewrite: Rewrite) -> Files:
    """Other weights, and all hashes right, so that the check itself must refuse."""
    size = int.from_bytes(files.weights[:8], "little")
    header = json.loads(files.weights[8 : 8 + size])
    hostile = rewrite(header, files.weights[8 + size :])
    return Files(resealed(adapted(files.config, hostile)), hostile)


def expect_refusal(load: Callable[[], object], match: str = "^load: ") -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        load()
    line = str(caught.value)
    assert line.startswith("load: ") and "\n" not in line and len(line) < 600, line
    return line


# Hostile text of a config


def text_cases(version: int) -> dict[str, tuple[Callable[[bytes], bytes], str]]:
    """Change of the config's bytes, and what must be said."""

    def versioned(text: bytes) -> Callable[[bytes], bytes]:
        return lambda c: c.replace(f'"format_version": {version}'.encode(), text)

    right = f'"format_version": {version}'.encode()
    return {
        "empty": (lambda c: b"", "must be JSON"),
        "cut": (lambda c: c[: len(c) // 2], "must be JSON"),
        "last byte cut": (lambda c: c[:-1], "seal must be"),
        "another byte": (lambda c: c + b"\n", "seal must be"),
        "nulls": (lambda c: b"\0" * len(c), "must be JSON"),
        "a list": (lambda c: b"[" + c + b"]", "must be a JSON object"),
        "a number": (lambda c: b"1", "must be a JSON object"),
        "deep": (lambda c: b"[" * 200_000, "must be JSON"),
        "not ASCII": (lambda c: c.replace(b"int8", "ïnt8".encode()), "must be JSON"),
        "another encoding": (lambda c: c.decode().encode("utf-16"), "must be JSON"),
        "pickle": (lambda c: pickle.dumps(json.loads(c)), "must be JSON"),
        "duplicate key": (
            versioned(b'"format_version": 9, ' + right),
            "must hold each key once",
        ),
        "NaN": (versioned(b'"format_version": NaN'), "format_vers"),
        "huge number": (versioned(b'"format_version": ' + b"9" * 5000), "must be JSON"),
        "no seal": (lambda c: c.replace(b'"seal"', b'"sale"'), "must have the key seal"),
        "seal broken": (lambda c: c.replace(b'"seal": "', b'"seal": "0'), "seal must be"),
        "other spaces": (lambda c: re.sub(b'": ', b'":  ', c), "seal must be"),
        "5 MB": (lambda c: c + b" " * (5 << 20), "must be of at most"),
    }


# Hostile tensors


def packed(header: Any, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def edited(edit: Edit) -> Rewrite:
    """The same content under a changed header."""

    def rewrite(header: dict[str, Any], content: bytes) -> bytes:
        edit(header)
        return packed(header, content)

    return rewrite


def retyped(name: str, change: Callable[[Tensor], Tensor]) -> Rewrite:
    """A well-formed file in which one tensor was changed."""

    def rewrite(header: dict[str, Any], content: bytes) -> bytes:
        tensors = safetensors.torch.load(packed(header, content))
        tensors[name] = change(tensors[name])
        return safetensors.torch.save(tensors)

    return rewrite


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """One element, or one row, is this."""

    def fill(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1] = value
        return tensor

    return fill


def weights_cases(name: str, dtype: str) -> dict[str, tuple[Rewrite, str]]:
    """Change of the tensors' file, and what must be said; `name` is a matrix in it."""
    rule = f"must be {dtype}"
    return {
        "empty": (lambda h, c: b"", "weights_bytes must be"),
        "no header": (lambda h, c: b"\0" * 8, "must be JSON"),
        "header size huge": (lambda h, c: b"\xff" * 8 + packed(h, c)[8:], "header whole"),
        "header size 0": (lambda h, c: b"\0" * 8 + packed(h, c)[8:], "must be JSON"),
        "header cut": (lambda h, c: packed(h, c)[:40], "header whole"),
        "content cut": (lambda h, c: packed(h, c[:-1]), "must be safetensors"),
        "content longer": (lambda h, c: packed(h, c + b"\0"), "must be safetensors"),
        "pickle": (lambda h, c: pickle.dumps(h), "header whole"),
        "header a list": (lambda h, c: packed([], c), "must be a JSON object"),
        "header deep": (lambda h, c: packed(b"[" * 100_000, c), "must be JSON"),
        "tensor twice": (
            lambda h, c: packed(
                json.dumps(h)[:-1].encode() + f', "{name}": {json.dumps(h[name])}}}'.encode(), c
            ),
            "must hold each key once",
        ),
        "metadata": (edited(lambda h: h.update(__metadata__={"x": "y"})), "no key but its own"),
        "tensor missing": (edited(lambda h: h.pop(name)), "must have the key"),
        "tensor renamed": (edited(lambda h: h.update(x=h.pop(name))), "must have the key"),
        "entry is null": (edited(lambda h: h.update({name: None})), "must be an object"),
        "entry without shape": (edited(lambda h: h[name].pop("shape")), "must have the key shape"),
        "entry with more": (edited(lambda h: h[name].update(x=1)), "no key but its own"),
        "shape turned": (edited(lambda h: h[name]["shape"].reverse()), rule),
        "shape negative": (edited(lambda h: h[name].update(shape=[-128, -32])), rule),
        "shape of floats": (
            edited(lambda h: h[name].update(shape=[float(n) for n in h[name]["shape"]])),
            rule,
        ),
        "shape flat": (edited(lambda h: h[name].update(shape=[128 * 32])), rule),
        "type U8": (edited(lambda h: h[name].update(dtype="U8")), rule),
        "type unknown": (edited(lambda h: h[name].update(dtype="pickle")), rule),
        "type is null": (edited(lambda h: h[name].update(dtype=None)), rule),
        "offsets overlap": (
            edited(lambda h: h[name].update(data_offsets=[0, 4096])),
            "safetensors",
        ),
        "offsets turned": (edited(lambda h: h[name]["data_offsets"].reverse()), "safetensors"),
        "offsets huge": (
            edited(lambda h: h[name].update(data_offsets=[2**63, 2**64])),
            "safetensors",
        ),
        "offsets negative": (
            edited(lambda h: h[name].update(data_offsets=[-4096, 0])),
            "safetensors",
        ),
        "offsets are text": (
            edited(lambda h: h[name].update(data_offsets="ab")),
            "must be safetensors",
        ),
        "huge": (lambda h, c: packed(h, c) + b"\0" * (5 << 20), "must be of at most"),
    }


# Anything at all


def mutate(data: bytes, source: random.Random) -> bytes:
    kind = source.randrange(5)
    # Half of them in the first bytes, where headers are
    at = source.randrange(len(data) if source.random() < 0.5 else min(2000, len(data)))
    length = source.choice([1, 1, 1, 2, 8, 100])
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 3:
        return data[:at] + source.randbytes(length) + data[at + length :]
    mutant = bytearray(data)
    mutant[at] ^= 1 << source.randrange(8)
    return bytes(mutant)


def mutants(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """As many files that are not this one."""
    source = random.Random(seed)
    while count:
        mutant = mutate(data, source)
        if mutant != data:
            count -= 1
            yield mutant


NOT_REGULAR = ["missing", "folder", "link", "broken link", "pipe"]


def make_irregular(path: Path, kind: str) -> None:
    """Puts one of NOT_REGULAR in the place of a file in a folder of its own."""
    elsewhere = path.rename(path.parents[1] / "elsewhere")
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "broken link":
        path.symlink_to(path.parents[1] / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)


# Saves that are cut off


class Cut(Exception):
    """The power went out."""


def cuts(monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> Iterator[None]:
    """Runs save again and again, cut off one write later each time, until it comes through.

    Yields after each that was cut off; the reader puts the old files back.
    """
    calls = {"left": 0}

    def cutting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Cut
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, cutting(getattr(os, name)))
        for calls_before_cut in range(1, 20):
            calls["left"] = calls_before_cut
            try:
                save()
            except Cut:
                calls["left"] = 0
                yield
            else:
                return
        raise AssertionError("never finished")


def check_seal_is_ours(config: bytes) -> None:
    """The forger of this file writes the bytes that the package writes."""
    raw = json.loads(config)
    assert resealed(raw) == sealed.render(raw) == config and seal_of(raw) == sealed.seal(raw)
