"""A checkpoint that is not one of ours is refused in one line: never a crash, never taken."""

import copy
import hashlib
import json
import math
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lraee
from lraee import checkpoint
from lraee.checkpoint import CONFIG_NAME
from lraee.files import CheckpointError
from tests.clip_models import make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes, bytes]:
    """A small model, and the two files of its checkpoint."""
    torch.manual_seed(0)
    model = make_model(vision={"layers": 1, "width": 32})
    folder = tmp_path_factory.mktemp("saved")
    lraee.save(lraee.accelerate(model), folder)
    (weights,) = folder.glob("*.safetensors")
    return model, (folder / CONFIG_NAME).read_bytes(), weights.read_bytes()


def put(folder: Path, config: bytes, weights: bytes, name: str | None = None) -> None:
    if name is None:
        name = checkpoint._weights_name(json.loads(config)["weights_sha256"])
    (folder / CONFIG_NAME).write_bytes(config)
    (folder / name).write_bytes(weights)


def sealed(config: dict[str, Any]) -> bytes:
    """As a careful attacker would write it: with the right seal."""
    return checkpoint._render({**config, "seal": checkpoint._seal(config)})


def expect_refusal(folder: Path, model: nn.Module, match: str = "^load: ") -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        lraee.load(folder, model)
    line = str(caught.value)
    assert line.startswith("load: ") and "\n" not in line and len(line) < 600, line
    return line


Edit = Callable[[dict[str, Any]], object]

CONFIG_CASES: dict[str, tuple[Edit, str]] = {
    "other format": (lambda c: c.update(format="pickle"), "format must be"),
    "format missing": (lambda c: c.pop("format"), "format must be"),
    "future version": (lambda c: c.update(format_version=2), "format_version must be 1"),
    "version 0": (lambda c: c.update(format_version=0), "format_version"),
    "version true": (lambda c: c.update(format_version=True), "format_version"),
    "version 1.0": (lambda c: c.update(format_version=1.0), "format_version"),
    "version as text": (lambda c: c.update(format_version="1"), "format_version"),
    "unknown key": (lambda c: c.update(pickle="x"), "must have no key but its own"),
    "no scheme": (lambda c: c.pop("scheme"), "must have the key scheme"),
    "no tensors": (lambda c: c.pop("tensors"), "must have the key tensors"),
    "no base hash": (lambda c: c.pop("base_sha256"), "must have the key base_sha256"),
    "scheme is a list": (lambda c: c.update(scheme=[]), "scheme must be an object"),
    "scheme is a name": (lambda c: c.update(scheme="int8"), "scheme must be an object"),
    "scheme has more": (lambda c: c["scheme"].update(x=1), "no key but its own"),
    "scheme has less": (lambda c: c["scheme"].pop("weights"), "must have the key weights"),
    "other choice": (lambda c: c["scheme"].update(weights="row"), "must be one of channel"),
    "choice is null": (lambda c: c["scheme"].update(weights=None), "must be of type str"),
    "flag is 0": (lambda c: c["scheme"].update(clip_weights=0), "must be of type bool"),
    "sites are text": (lambda c: c["scheme"].update(symmetric="c_fc"), "must be of type list"),
    "other site": (lambda c: c["scheme"].update(symmetric=["c_fx"]), "symmetric must be one of"),
    "site is a list": (lambda c: c["scheme"].update(symmetric=[[]]), "must hold strings"),
    "kept linear unknown": (lambda c: c["scheme"].update(keep_float=["../.."]), "must name linea"),
    "kept linear is 1": (lambda c: c["scheme"].update(keep_float=[1]), "must hold strings"),
    "kept linear is listed": (
        lambda c: c["scheme"].update(keep_float=["resblocks.0.mlp.c_fc"]),
        "tensors must be those",
    ),
    "other backend": (lambda c: c.update(backend="cuda"), "backend must be one of"),
    "backend is a list": (lambda c: c.update(backend=["cpu"]), "backend must be one of"),
    "versions is text": (lambda c: c.update(versions="2"), "versions must be an object"),
    "version of torch is 2": (lambda c: c["versions"].update(torch=2), "must be a string"),
    "base hash short": (lambda c: c.update(base_sha256="ab"), "64 hexadecimal"),
    "base hash is null": (lambda c: c.update(base_sha256=None), "64 hexadecimal"),
    "base hash of others": (lambda c: c.update(base_sha256="0" * 64), "image tower of the given"),
    "state hash of others": (lambda c: c.update(state_sha256="0" * 64), "given model with these"),
    "weights hash of others": (lambda c: c.update(weights_sha256="0" * 64), "must be a regular"),
    "weights hash is a path": (
        lambda c: c.update(weights_sha256="../../../../etc/passwd".ljust(64, "/")),
        "64 hexadecimal",
    ),
    "weights hash in capitals": (
        lambda c: c.update(weights_sha256=c["weights_sha256"].upper()),
        "64 hexadecimal",
    ),
    "size negative": (lambda c: c.update(weights_bytes=-1), "weights_bytes must be an integer"),
    "size is a float": (
        lambda c: c.update(weights_bytes=float(c["weights_bytes"])),
        "weights_bytes must be an integer",
    ),
    "size one more": (lambda c: c.update(weights_bytes=c["weights_bytes"] + 1), "must be of"),
    "size huge": (lambda c: c.update(weights_bytes=10**30), "must be of 10000"),
    "tensors is null": (lambda c: c.update(tensors=None), "tensors must be those"),
    "tensor missing": (lambda c: c["tensors"].popitem(), "tensors must be those"),
    "tensor unknown": (lambda c: c["tensors"].update(x=["I8", [1]]), "tensors must be those"),
    "shape of floats": (
        lambda c: c["tensors"].update({"resblocks.0.mlp.c_fc.w_q": ["I8", [128.0, 32.0]]}),
        "tensors must be those",
    ),
    "shape negative": (
        lambda c: c["tensors"].update({"resblocks.0.mlp.c_fc.w_q": ["I8", [-128, -32]]}),
        "tensors must be those",
    ),
    "shape huge": (
        lambda c: c["tensors"].update({"resblocks.0.mlp.c_fc.w_q": ["I8", [2**62, 2**62]]}),
        "tensors must be those",
    ),
    "shape turned": (
        lambda c: c["tensors"].update({"resblocks.0.mlp.c_fc.w_q": ["I8", [32, 128]]}),
        "tensors must be those",
    ),
    "type turned": (
        lambda c: c["tensors"].update({"resblocks.0.mlp.c_fc.w_scale": ["F16", [128]]}),
        "tensors must be those",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_hostile_config(saved: tuple[nn.Module, bytes, bytes], tmp_path: Path, case: str) -> None:
    model, config, weights = saved
    edit, match = CONFIG_CASES[case]
    edited = json.loads(config)
    edit(edited)
    name = checkpoint._weights_name(json.loads(config)["weights_sha256"])
    put(tmp_path, sealed(edited), weights, name)
    expect_refusal(tmp_path, model, match)


TEXT_CASES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "must be JSON"),
    "cut": (lambda c: c[: len(c) // 2], "must be JSON"),
    "last byte cut": (lambda c: c[:-1], "seal must be"),
    "another byte": (lambda c: c + b"\n", "seal must be"),
    "nulls": (lambda c: b"\0" * len(c), "must be JSON"),
    "a list": (lambda c: b"[" + c + b"]", "must be a JSON object"),
    "a number": (lambda c: b"1", "must be a JSON object"),
    "deep": (lambda c: b"[" * 200_000, "must be JSON"),
    "not ASCII": (lambda c: c.replace(b"auto", "äuto".encode()), "must be JSON"),
    "another encoding": (lambda c: c.decode().encode("utf-16"), "must be JSON"),
    "pickle": (lambda c: pickle.dumps(json.loads(c)), "must be JSON"),
    "duplicate key": (
        lambda c: c.replace(b'"format_version": 1', b'"format_version": 2, "format_version": 1'),
        "must hold each key once",
    ),
    "NaN": (lambda c: c.replace(b'"format_version": 1', b'"format_version": NaN'), "format_vers"),
    "huge number": (
        lambda c: c.replace(b'"format_version": 1', b'"format_version": ' + b"9" * 5000),
        "must be JSON",
    ),
    "no seal": (lambda c: c.replace(b'"seal"', b'"sale"'), "must have the key seal"),
    "seal broken": (lambda c: c.replace(b'"seal": "', b'"seal": "0'), "seal must be"),
    "other spaces": (lambda c: c.replace(b'": ', b'":  '), "seal must be"),
    "5 MB": (lambda c: c + b" " * (5 << 20), "must be of at most"),
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_hostile_text(saved: tuple[nn.Module, bytes, bytes], tmp_path: Path, case: str) -> None:
    model, config, weights = saved
    edit, match = TEXT_CASES[case]
    name = checkpoint._weights_name(json.loads(config)["weights_sha256"])
    put(tmp_path, edit(config), weights, name)
    expect_refusal(tmp_path, model, match)


def packed(header: Any, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


Rewrite = Callable[[dict[str, Any], bytes], bytes]


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
    def fill(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1] = value
        return tensor

    return fill


W, S = "resblocks.0.mlp.c_fc.w_q", "resblocks.0.mlp.c_fc.w_scale"

WEIGHTS_CASES: dict[str, tuple[Rewrite, str]] = {
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
            json.dumps(h)[:-1].encode() + f', "{W}": {json.dumps(h[W])}}}'.encode(), c
        ),
        "must hold each key once",
    ),
    "metadata": (edited(lambda h: h.update(__metadata__={"x": "y"})), "no key but its own"),
    "tensor missing": (edited(lambda h: h.pop(W)), "must have the key"),
    "tensor renamed": (edited(lambda h: h.update(x=h.pop(W))), "must have the key"),
    "entry is null": (edited(lambda h: h.update({W: None})), "must be an object"),
    "entry without shape": (edited(lambda h: h[W].pop("shape")), "must have the key shape"),
    "entry with more": (edited(lambda h: h[W].update(x=1)), "no key but its own"),
    "shape turned": (edited(lambda h: h[W]["shape"].reverse()), "must be I8"),
    "shape negative": (edited(lambda h: h[W].update(shape=[-128, -32])), "must be I8"),
    "shape of floats": (edited(lambda h: h[W].update(shape=[128.0, 32.0])), "must be I8"),
    "shape flat": (edited(lambda h: h[W].update(shape=[128 * 32])), "must be I8"),
    "type U8": (edited(lambda h: h[W].update(dtype="U8")), "must be I8"),
    "type unknown": (edited(lambda h: h[W].update(dtype="pickle")), "must be I8"),
    "type is null": (edited(lambda h: h[W].update(dtype=None)), "must be I8"),
    "offsets overlap": (edited(lambda h: h[W].update(data_offsets=[0, 4096])), "safetensors"),
    "offsets turned": (edited(lambda h: h[W]["data_offsets"].reverse()), "safetensors"),
    "offsets huge": (edited(lambda h: h[W].update(data_offsets=[2**63, 2**64])), "safetensors"),
    "offsets negative": (edited(lambda h: h[W].update(data_offsets=[-4096, 0])), "safetensors"),
    "offsets are text": (edited(lambda h: h[W].update(data_offsets="ab")), "must be safetensors"),
    "scale of doubles": (retyped(S, Tensor.double), "must be F32"),
    "scale of halves": (retyped(S, Tensor.half), "must be F32"),
    "scale of other size": (retyped(S, lambda t: t[:-1].clone()), "must be F32"),
    "scale NaN": (retyped(S, filled(math.nan)), r"w_scale\[1\] must be finite and above 0, got n"),
    "scale Inf": (retyped(S, filled(math.inf)), r"w_scale\[1\] must be finite and above 0, got i"),
    "scale negative": (retyped(S, filled(-0.5)), r"w_scale\[1\] must be finite and above 0"),
    "scale 0": (retyped(S, filled(0.0)), r"w_scale\[1\] must be finite and above 0, got 0.0"),
    "weight another": (retyped(W, filled(5)), "state_sha256 must be that of the given model"),
    "scale another": (retyped(S, filled(0.5)), "state_sha256 must be that of the given model"),
    "huge": (lambda h, c: packed(h, c) + b"\0" * (5 << 20), "must be of at most"),
}


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_hostile_weights(saved: tuple[nn.Module, bytes, bytes], tmp_path: Path, case: str) -> None:
    """Each with the hashes of lraee.json made right again, so that the check itself must refuse."""
    model, config, weights = saved
    size = int.from_bytes(weights[:8], "little")
    rewrite, match = WEIGHTS_CASES[case]
    hostile = rewrite(json.loads(weights[8 : 8 + size]), weights[8 + size :])
    adapted = json.loads(config)
    adapted["weights_sha256"] = hashlib.sha256(hostile).hexdigest()
    adapted["weights_bytes"] = len(hostile)
    put(tmp_path, sealed(adapted), hostile)
    expect_refusal(tmp_path, model, match)


def test_cases_are_as_many_as_promised() -> None:
    assert len(CONFIG_CASES) + len(TEXT_CASES) + len(WEIGHTS_CASES) >= 60


@pytest.mark.parametrize("file", ["config", "weights"])
@pytest.mark.parametrize("kind", ["missing", "folder", "link", "broken link", "pipe"])
def test_not_a_regular_file(
    saved: tuple[nn.Module, bytes, bytes], tmp_path: Path, file: str, kind: str
) -> None:
    model, config, weights = saved
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    put(folder, config, weights)
    path = folder / CONFIG_NAME if file == "config" else next(folder.glob("*.safetensors"))
    elsewhere = path.rename(tmp_path / "elsewhere")
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    assert str(path) in expect_refusal(folder, model, "must be a regular file, no link")


def test_no_such_folder(saved: tuple[nn.Module, bytes, bytes], tmp_path: Path) -> None:
    expect_refusal(tmp_path / "nowhere", saved[0], "must be a regular file")


def test_other_float_weights_are_refused(
    saved: tuple[nn.Module, bytes, bytes], tmp_path: Path
) -> None:
    model, config, weights = saved
    put(tmp_path, config, weights)
    torch.manual_seed(1)
    expect_refusal(tmp_path, make_model(), "image tower of the given model")
    for part, match in (
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", "image tower"),
        ("visual.conv1.weight", "image tower"),
        ("visual.proj", "image tower"),
        ("logit_scale", "another text tower"),
        ("token_embedding.weight", "another text tower"),
    ):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(part).view(-1)[0] += 1
        expect_refusal(tmp_path, other, match)
    expect_refusal(tmp_path, copy.deepcopy(model).half(), "image tower")
    with pytest.raises(ValueError, match="accelerated already"):
        lraee.load(tmp_path, lraee.accelerate(model))


@pytest.mark.parametrize("file", ["config", "weights"])
def test_a_thousand_mutations(
    saved: tuple[nn.Module, bytes, bytes], tmp_path: Path, file: str
) -> None:
    """Bytes changed, cut out, doubled or swapped at random: each is refused, none crashes."""
    model, config, weights = saved
    source = random.Random(0)
    name = checkpoint._weights_name(json.loads(config)["weights_sha256"])
    put(tmp_path, config, weights)
    lraee.load(tmp_path, model)
    original = config if file == "config" else weights
    path = tmp_path / (CONFIG_NAME if file == "config" else name)
    count = 0
    while count < 1000:
        mutant = mutate(original, source)
        if mutant == original:
            continue
        path.write_bytes(mutant)
        expect_refusal(tmp_path, model)
        count += 1


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
