"""Files of either format that are not ours are refused in one line: never a crash, never taken."""

import json
import math
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exits.small_exits import nested
from tests.sealed_files import FORMATS, Store, make_store, packed, resealed, retyped, unpacked


@pytest.fixture(scope="module", params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(request.param, tmp_path_factory.mktemp("saved"))


def test_intact_and_resealed_files_are_taken(store: Store, tmp_path: Path) -> None:
    """So that what is refused below is refused for what it says, and not for its seal."""
    assert resealed(json.loads(store.config)) == store.config
    change = retyped(store.weights, f"{store.tensor}heads.1.b1", lambda t: t.clone())
    store.put(tmp_path, weights=change)
    store.load(tmp_path)


# Settings, each with the right seal

MISSING = object()
BUSHY: Any = [[[[[["x" * 9] * 6] * 6] * 6] * 6] * 6] * 6
PLAN = "plans.learned."
COUNT, NUMBER, TENSORS = "must be an integer from 1", "must be a finite float32", "tensors must be"
WIDE = [{"block": b, "hidden": 65536, "inputs": 65536} for b in (1, 2)]

TOP: list[tuple[str, Any, str]] = [
    ("format", "pickle", "format must be"),
    ("format", MISSING, "format must be"),
    ("format_version", 10**4000, "the one that this lraee reads, got 1000"),
    ("format_version", 9, "got 9; upgrade lraee"),
    ("format_version", 0, "got 0; write it again with"),
    ("format_version", True, "format_version must be"),
    ("format_version", 1.0, "format_version must be"),
    ("format_version", "1", "format_version must be"),
    ("x", "y", "must have no key but its own"),
    ("tensors", MISSING, "must have the key tensors"),
    ("tensors", None, "tensors must be an object"),
    ("tensors", {}, TENSORS),
    ("tensors.x", ["I8", [1]], TENSORS),
    ("tensors.{}heads.1.b1", ["F32", [2**62, 2**62]], TENSORS),
    ("tensors.{}heads.1.b1", ["F32", [-16]], TENSORS),
    ("tensors.{}heads.1.b1", BUSHY, TENSORS),
    ("weights_sha256", "../../../../etc/passwd".ljust(64, "/"), "must be 64 hexadecimal"),
    ("weights_sha256", "AB" * 32, "must be 64 hexadecimal"),
    ("weights_sha256", "0" * 64, "must be a readable file, got No such file"),
    ("weights_bytes", -1, "weights_bytes must be an integer from 0"),
    ("weights_bytes", 1e3, "weights_bytes must be an integer from 0"),
    ("weights_bytes", 10**30, "weights_bytes must be an integer from 0"),
    ("weights_bytes", 1000, "must be of 1000 bytes"),
    ("scheme", [], "scheme must be an object"),
    ("scheme", "int8", "scheme must be an object"),
    ("scheme.x", 1, "scheme must have no key but its own"),
    ("scheme.weights", MISSING, "scheme must have the key weights"),
    ("scheme.weights", "row", "weights must be one of channel, tensor, got 'row'"),
    ("scheme.weights", None, "scheme.weights must be a string"),
    ("scheme.clip_weights", 0, "scheme.clip_weights must be true or false"),
    ("scheme.symmetric", "c_fc", "scheme.symmetric must be a list"),
    ("scheme.symmetric", ["c_fx"], "symmetric must be one of"),
    ("scheme.symmetric", [[]], "scheme.symmetric[0] must be a string"),
]
CHECKPOINT: list[tuple[str, Any, str]] = [
    ("scheme.keep_float", ["../.."], "keep_float must name linears"),
    ("scheme.keep_float", ["resblocks.0.mlp.c_fc"], TENSORS),
    ("backend", "cuda", "backend must be one of auto"),
    ("backend", ["cpu"], "backend must be one of auto"),
    ("versions", "2", "versions must be an object"),
    ("versions.torch", 2, "versions.torch must be 1 to 64 printable"),
    ("base_sha256", None, "base_sha256 must be 64 hexadecimal"),
    ("base_sha256", "0" * 64, "image tower of the given model, got"),
    ("state_sha256", "0" * 64, "with these int8 weights"),
    ("exits", MISSING, "must have the key exits"),
    ("exits", None, TENSORS),
    ("exits", [], "exits must be an object"),
    ("exits.base_hash", "0" * 64, "exits.base_hash must be base_sha256"),
    ("exits.scheme.clip_weights", True, "exits.scheme must be scheme"),
]
EXITS: list[tuple[str, Any, str]] = [
    ("heads", {}, "heads must be a list of 1 to 64"),
    ("heads", [], "heads must be a list of 1 to 64"),
    ("heads", [BUSHY], "heads[0] must be an object"),
    ("heads", [{}] * 65, "heads must be a list of 1 to 64"),
    ("heads", WIDE, "at most 1073741824 bytes"),
    ("heads", [{"block": b, "hidden": 1, "inputs": 8} for b in (2, 2)], "block must ascend"),
    ("heads", [{"block": b, "hidden": 1, "inputs": 8 * b} for b in (1, 3)], "must be D or 2 D"),
    ("heads.0.x", 1, "heads[0] must have no key but its own"),
    ("heads.0.hidden", MISSING, "heads[0] must have the key hidden"),
    *(("heads.0.block", v, COUNT) for v in (0, 513, -1, True, 2.0, "2", None, [2])),
    ("heads.0.block", 2, TENSORS),
    *(("heads.0.inputs", v, COUNT) for v in (0, 10**30, True, 8.0)),
    ("heads.0.inputs", 16, TENSORS),
    ("heads.0.hidden", 0, COUNT),
    ("heads.0.hidden", 4, TENSORS),
    ("embedding", None, COUNT),
    ("embedding", 7, TENSORS),
    ("classes", True, COUNT),
    ("classes", 2**25, COUNT),
    ("classes", 100, TENSORS),
    ("classes", None, TENSORS),
    ("plans", [], "plans must be an object of 1 to 256"),
    ("plans", {}, "plans must be an object of 1 to 256"),
    ("plans", dict.fromkeys(map(str, range(257))), "plans must be an object of 1 to 256"),
    ("plans", {"": {}}, "printable ASCII"),
    ("plans", {"x" * 1_000_000: {}}, "printable ASCII"),
    ("plans", {"\x1b[2J": {}}, "printable ASCII"),
    ("plans", {"a\nb": {}}, "printable ASCII"),
    ("plans", {"é": {}}, "printable ASCII"),
    ("plans.x", None, "plans.x must be an object"),
    (PLAN + "x", 1, "no key but its own"),
    (PLAN + "blocks", None, "blocks must be a list of 0 to 64"),
    (PLAN + "blocks", [2], "must use heads that are there"),
    (PLAN + "blocks", [2, 1], "must ascend"),
    (PLAN + "blocks", [True], COUNT),
    (PLAN + "blocks", [], "one row per exit"),
    (PLAN + "kind", "oracle", "kind must be one of learned"),
    (PLAN + "kind", ["learned"], "kind must be one of learned"),
    (PLAN + "kind", "x" * 1_000_000, "kind must be one of learned"),
    (PLAN + "weights", [], "one row per exit"),
    (PLAN + "weights", [[0.0] * 4] * 65, "weights must be a list of 0 to 64"),
    (PLAN + "weights", [[0.0] * 3], "weights[0] must be a list of 4 to 4"),
    *((PLAN + "weights", [[v, 0.0, 0.0, 0.0]], NUMBER) for v in (0, "inf", None, 3.5e38, BUSHY)),
    (PLAN + "weights", [[math.nan] * 4], "must hold finite numbers"),
    *((PLAN + "thresholds", [v], NUMBER) for v in (1, True, None, "nan", "Infinity", 1e39, [1.0])),
    (PLAN + "thresholds", [math.inf], "must hold finite numbers"),
    *((PLAN + "thresholds", [v], "must be exact in float32") for v in (0.1, 1e-60)),
    *(("chosen", v, "chosen must be 1 to 64 printable") for v in (None, {}, "x" * 65)),
    ("chosen", "b", "chosen must be one of"),
    *(("logit_scale", v, NUMBER) for v in (0.0, -1.0, 100, True, "inf", 1e300)),
    *(("copy_share", v, NUMBER) for v in (-0.25, 0, False, 1e300)),
    *(("base_hash", v, "base_hash must be 64") for v in ("ab", None, ["a"] * 64)),
    *(("card", v, "card must be an object") for v in (None, [], "{}", {"x": nested(32)})),
    ("card", {"x": "y" * (1 << 20)}, "card must be an object of at most 32 levels and 1048576"),
    ("card", {"x": math.nan}, "must hold finite numbers"),
]


@pytest.mark.parametrize("group", ["TOP", "CHECKPOINT", "EXITS"])
def test_hostile_settings(store: Store, tmp_path: Path, group: str) -> None:
    if group == "CHECKPOINT" and not store.field:
        pytest.skip("fields of the other format")
    for path, value, match in globals()[group]:
        config = json.loads(store.config)
        if path.startswith("tensors."):
            *keys, last = "tensors", path.removeprefix("tensors.").format(store.tensor)
        else:
            *keys, last = (store.field * (group == "EXITS") + path).split(".")
        place = config
        for key in keys:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
        store.put(tmp_path, resealed(config))
        store.expect_refusal(tmp_path, match)


# Text of the config

TEXT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "must be JSON"),
    "cut": (lambda c: c[: len(c) // 2], "must be JSON"),
    "last byte cut": (lambda c: c[:-1], "seal must be"),
    "another byte": (lambda c: c + b"\n", "seal must be"),
    "nulls": (lambda c: b"\0" * len(c), "must be JSON"),
    "a list": (lambda c: b"[" + c + b"]", "must be a JSON object"),
    "deep": (lambda c: b'{"x":' + b"[" * 200_000, "must be JSON"),
    "not ASCII": (lambda c: c.replace(b"channel", "chännel".encode()), "must be JSON"),
    "not UTF-8": (lambda c: c.replace(b"channel", b"ch\xffnnel"), "must be JSON"),
    "another encoding": (lambda c: c.decode().encode("utf-16"), "must be JSON"),
    "pickle": (lambda c: pickle.dumps(json.loads(c)), "must be JSON"),
    "duplicate key": (lambda c: b'{"seal": 1,' + c[1:], "must hold each key once"),
    "huge number": (lambda c: b'{"x": ' + b"9" * 5000 + b"}", "must be JSON"),
    "no seal": (lambda c: c.replace(b'"seal"', b'"sale"'), "seal must be"),
    "seal broken": (lambda c: c.replace(b'"seal": "', b'"seal": "0'), "seal must be"),
    "other spaces": (lambda c: re.sub(b'": ', b'":  ', c), "seal must be"),
    "5 MB": (lambda c: c + b" " * (5 << 20), "must be of at most"),
}


@pytest.mark.parametrize("case", TEXT)
def test_hostile_text(store: Store, tmp_path: Path, case: str) -> None:
    change, match = TEXT[case]
    store.put(tmp_path, change(store.config))
    store.expect_refusal(tmp_path, match)


# Header and tensors, each with the right hash; `n` is a matrix

Header = dict[str, Any]
HEADER: dict[str, tuple[Callable[[Header, bytes, str], bytes], str]] = {
    "empty": (lambda h, c, n: b"", "header must be of -"),
    "no header": (lambda h, c, n: b"\0" * 8 + c, "must be JSON"),
    "size huge": (lambda h, c, n: b"\xff" * 8 + packed(h, c)[8:], "header must be of"),
    "size 0": (lambda h, c, n: b"\0" * 8 + packed(h, c)[8:], "header must be of"),
    "cut": (lambda h, c, n: packed(h, c)[:40], "header must be of -"),
    "content cut": (lambda h, c, n: packed(h, c[:-1]), "header must be of"),
    "content longer": (lambda h, c, n: packed(h, c + b"\0"), "header must be of"),
    "pickle": (lambda h, c, n: pickle.dumps(h), "header must be of"),
    "a list": (lambda h, c, n: packed([], c), "must be a JSON object"),
    "deep": (lambda h, c, n: packed(b"[" * 100_000, c), "must be JSON"),
    "huge header": (lambda h, c, n: packed(b" " * (5 << 20), c), "must be of at most"),
    "tensor twice": (
        lambda h, c, n: packed(json.dumps(h)[:-1].encode() + f', "{n}": 1}}'.encode(), c),
        "must hold each key once",
    ),
    "metadata": (lambda h, c, n: packed({**h, "__metadata__": {"x": "y"}}, c), "no key but its"),
    "renamed": (lambda h, c, n: packed({"x": h.pop(n), **h}, c), "must have the key"),
    "null": (lambda h, c, n: packed({**h, n: None}, c), "must be an object"),
}
AT, SHAPE = " must lie at ", " must be F32 ["
ENTRY: list[tuple[str, Any, str]] = [
    ("x", 1, "no key but its own"),
    ("shape", [-2, 3], "shape[0] must be an integer from 0"),
    ("shape", [10**30], "shape[0] must be an integer from 0"),
    ("shape", [2.0, 3.0], "shape[0] must be an integer from 0"),
    ("shape", [1] * 9, "shape must be a list of 0 to 8"),
    ("shape", [6], SHAPE),
    ("dtype", "I32", SHAPE),
    ("dtype", "pickle", SHAPE),
    ("dtype", None, "dtype must be a string"),
    ("data_offsets", [0, 4096], AT),
    ("data_offsets", [4096, 0], AT),
    ("data_offsets", [2**49, 2**49 + 4], AT),
    ("data_offsets", [2**63, 2**64], "must be an integer from 0"),
    ("data_offsets", [-4096, 0], "must be an integer from 0"),
    ("data_offsets", "ab", "data_offsets must be a list of 2"),
]


def test_hostile_headers(store: Store, tmp_path: Path) -> None:
    name = f"{store.tensor}heads.1.w1"
    for rewrite, match in HEADER.values():
        store.put(tmp_path, weights=rewrite(*unpacked(store.weights), name))
        store.expect_refusal(tmp_path, match)
    for key, value, match in ENTRY:
        header, content = unpacked(store.weights)
        header[name][key] = value
        store.put(tmp_path, weights=packed(header, content))
        store.expect_refusal(tmp_path, match)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t[:1], torch.full_like(t[1:2], value), t[2:]])


S = "resblocks.0.mlp.c_fc.w_scale"
TENSOR: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    *((n, filled(v), f"must be finite, got {v}")
      for v in (math.nan, math.inf, -math.inf) for n in ("w1", "b1", "gamma", "beta")),
    ("b1", Tensor.double, SHAPE),
    ("b1", Tensor.half, "header must be of"),
    ("b1", Tensor.int, SHAPE),
    ("classes", lambda t: t * 1.01, "classes[0] must be rows of length 1, got 1.0"),
    ("classes", filled(0.0), "classes[1] must be rows of length 1, got 0.0"),
    ("classes", filled(math.nan), "classes[1] must be rows of length 1, got nan"),
    *((S, filled(v), f"w_scale[1] must be finite and above 0, got {v}")
      for v in (math.nan, math.inf, -0.5, 0.0)),
    (S, filled(0.5), "state_sha256 must be that of the given model"),
]  # fmt: skip


def test_hostile_tensors(store: Store, tmp_path: Path) -> None:
    for name, change, match in TENSOR:
        if name != S:
            name = store.tensor + (name if name == "classes" else f"heads.1.{name}")
        elif not store.field:
            continue
        store.put(tmp_path, weights=retyped(store.weights, name, change))
        store.expect_refusal(tmp_path, match.replace(SHAPE, "must"))


def test_tensors_of_another_save_are_refused(store: Store, tmp_path: Path) -> None:
    path = store.put(tmp_path)
    path.write_bytes(store.weights[:-1] + bytes([store.weights[-1] ^ 1]))
    store.expect_refusal(tmp_path, "must have sha256")


# What is not a file, and anything at all


@pytest.mark.parametrize("is_config", [True, False], ids=["config", "weights"])
@pytest.mark.parametrize("kind", ["missing", "folder", "broken link", "loop", "pipe", "device"])
def test_not_a_regular_file(store: Store, tmp_path: Path, is_config: bool, kind: str) -> None:
    path = store.put(tmp_path)
    path = tmp_path / store.form.config_name if is_config else path
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        links = {"broken link": "nowhere", "loop": path.name, "device": "/dev/zero"}
        path.symlink_to(links[kind])
    is_special = kind in ("folder", "pipe", "device")
    match = "must be a regular file or a link to one, got" if is_special else "must be a readable"
    assert str(path) in store.expect_refusal(tmp_path, match)


@pytest.mark.parametrize("is_config", [True, False], ids=["config", "weights"])
def test_cut_off_flipped_or_mutated_anywhere(store: Store, tmp_path: Path, is_config: bool) -> None:
    path, data = store.put(tmp_path), store.weights
    if is_config:
        path, data = tmp_path / store.form.config_name, store.config
    source = random.Random(0)
    for _ in range(60):
        at = source.randrange(min(len(data), source.choice([len(data), 2000])))
        size = source.choice([1, 2, 8, 100])
        flipped = bytearray(data)
        flipped[at] ^= 1 << source.randrange(8)
        doubled = data[: at + size] + data[at:]
        for mutant in (data[:at], bytes(flipped), data[:at] + data[at + size :], doubled):
            path.write_bytes(mutant)
            store.expect_refusal(tmp_path, "load: ")
