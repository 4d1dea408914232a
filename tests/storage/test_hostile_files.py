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
from tests.sealed_files import Store, packed, resealed, retyped, unpacked


def test_intact_and_resealed_files_are_taken(store: Store, tmp_path: Path) -> None:
    """So that what is refused below is refused for what it says, and not for its seal."""
    assert resealed(json.loads(store.config)) == store.config
    store.put(tmp_path, weights=retyped(store.weights, store.name("b1"), Tensor.clone))
    store.load(tmp_path)


# Settings, each with the right seal: field, its values, what the refusal says

MISSING = object()
BUSHY: Any = [[[[[["x" * 9] * 6] * 6] * 6] * 6] * 6] * 6
PLAN = "plans.learned."
COUNT, NUMBER, OWN = "must be an integer from 1", "must be a finite float32", "no key but its own"
TENSORS, DIGEST, NAME = "tensors must be", "must be 64 hexadecimal", "must be 1 to 64 printable"
Rows = list[tuple[str, list[Any], str]]
TOP: Rows = [
    ("format", ["pickle", MISSING], "format must be"),
    ("format_version", [10**4000], "the one that this lraee reads, got 1000"),
    ("format_version", [9], "got 9; upgrade lraee"),
    ("format_version", [0, True, 1.0, "1"], "; write it again with"),
    ("x", ["y"], OWN),
    ("tensors", [MISSING], "must have the key tensors"),
    ("tensors", [None], "tensors must be an object"),
    ("tensors", [{}], TENSORS),
    ("tensors.x", [["I8", [1]], None], TENSORS),
    ("tensors.{}heads.1.b1", [["F32", [2**62, 2**62]], ["F32", [-16]], BUSHY], TENSORS),
    ("weights_sha256", ["../../../../etc/passwd".ljust(64, "/"), "AB" * 32], DIGEST),
    ("weights_sha256", ["0" * 64], "must be a readable file, got No such file"),
    ("weights_bytes", [-1, 1e3, 10**30], "weights_bytes must be an integer from 0"),
    ("weights_bytes", [1000], "must be of 1000 bytes"),
    ("scheme", [[], "int8"], "scheme must be an object"),
    ("scheme.x", [1], OWN),
    ("scheme.weights", [MISSING], "scheme must have the key weights"),
    ("scheme.weights", ["row"], "weights must be one of channel, tensor, got 'row'"),
    ("scheme.weights", [None], "scheme.weights must be a string"),
    ("scheme.clip_weights", [0], "scheme.clip_weights must be true or false"),
    ("scheme.symmetric", ["c_fc"], "scheme.symmetric must be a list"),
    ("scheme.symmetric", [["c_fx"]], "symmetric must be one of"),
    ("scheme.symmetric", [[[]]], "scheme.symmetric[0] must be a string"),
]
CHECKPOINT: Rows = [
    ("scheme.keep_float", [["../.."]], "keep_float must name linears"),
    ("scheme.keep_float", [["resblocks.0.mlp.c_fc"]], TENSORS),
    ("backend", ["cuda", ["cpu"]], "backend must be one of auto"),
    ("versions", ["2"], "versions must be an object"),
    ("versions.torch", [2], f"versions.torch {NAME}"),
    ("base_sha256", [None], DIGEST),
    ("base_sha256", ["0" * 64], "image tower of the given model, got"),
    ("state_sha256", ["0" * 64], "with these int8 weights"),
    ("exits", [MISSING], "must have the key exits"),
    ("exits", [None], TENSORS),
    ("exits", [[]], "exits must be an object"),
    ("exits.base_hash", ["0" * 64], "exits.base_hash must be base_sha256"),
    ("exits.scheme.clip_weights", [True], "exits.scheme must be scheme"),
]
EXITS: Rows = [
    ("heads", [{}, [], [{}] * 65], "heads must be a list of 1 to 64"),
    ("heads", [[BUSHY]], "heads[0] must be an object"),
    ("heads", [[{"block": b, "hidden": 65536, "inputs": 65536} for b in (1, 2)]], "at most 107374"),
    ("heads", [[{"block": b, "hidden": 1, "inputs": 8} for b in (2, 2)]], "block must ascend"),
    ("heads", [[{"block": b, "hidden": 1, "inputs": 8 * b} for b in (1, 3)]], "must be D or 2 D"),
    ("heads.0.x", [1], "heads[0] must have no key but its own"),
    ("heads.0.hidden", [MISSING], "heads[0] must have the key hidden"),
    ("heads.0.block", [0, 513, -1, True, 2.0, "2", None, [2]], COUNT),
    ("heads.0.inputs", [0, 10**30, True, 8.0], COUNT),
    ("heads.0.hidden", [0], COUNT),
    ("embedding", [None], COUNT),
    ("classes", [True, 2**25], COUNT),
    *((name, values, TENSORS) for name, values in (
        ("heads.0.block", [2]), ("heads.0.inputs", [16]), ("heads.0.hidden", [4]),
        ("embedding", [7]), ("classes", [100, None]))),
    ("plans", [[], {}, dict.fromkeys(map(str, range(257)))], "plans must be an object of 1 to 256"),
    ("plans", [{name: {}} for name in ("", "x" * 1_000_000, "\x1b[2J", "a\nb", "é")], NAME),
    ("plans.x", [None], "plans.x must be an object"),
    (PLAN + "x", [1], OWN),
    (PLAN + "blocks", [None], "blocks must be a list of 0 to 64"),
    (PLAN + "blocks", [[2]], "must use heads that are there"),
    (PLAN + "blocks", [[2, 1]], "must ascend"),
    (PLAN + "blocks", [[True]], COUNT),
    (PLAN + "blocks", [[]], "one row per exit"),
    (PLAN + "kind", ["oracle", ["learned"], "x" * 1_000_000], "kind must be one of learned"),
    (PLAN + "weights", [[]], "one row per exit"),
    (PLAN + "weights", [[[0.0] * 4] * 65], "weights must be a list of 0 to 64"),
    (PLAN + "weights", [[[0.0] * 3]], "weights[0] must be a list of 4 to 4"),
    (PLAN + "weights", [[[v, 0.0, 0.0, 0.0]] for v in (0, "inf", None, 3.5e38, BUSHY)], NUMBER),
    (PLAN + "weights", [[[math.nan] * 4]], "must hold finite numbers"),
    (PLAN + "thresholds", [[v] for v in (1, True, None, "nan", "Infinity", 1e39, [1.0])], NUMBER),
    (PLAN + "thresholds", [[math.inf]], "must hold finite numbers"),
    (PLAN + "thresholds", [[0.1], [1e-60]], "must be exact in float32"),
    ("chosen", [None, {}, "x" * 65], f"chosen {NAME}"),
    ("chosen", ["b"], "chosen must be one of"),
    ("logit_scale", [0.0, -1.0, 100, True, "inf", 1e300], NUMBER),
    ("copy_share", [-0.25, 0, False, 1e300], NUMBER),
    ("base_hash", ["ab", None, ["a"] * 64], DIGEST),
    ("card", [None, [], "{}", {"x": nested(32)}, {"x": "y" * (1 << 20)}],
     "card must be an object of at most 32 levels and 1048576"),
    ("card", [{"x": math.nan}], "must hold finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize("group", ["TOP", "CHECKPOINT", "EXITS"])
def test_hostile_settings(store: Store, tmp_path: Path, group: str) -> None:
    if group == "CHECKPOINT" and not store.prefix:
        pytest.skip("fields of the other format")
    rows: Rows = globals()[group]
    for path, value, match in ((path, v, match) for path, values, match in rows for v in values):
        config = json.loads(store.config)
        if path.startswith("tensors."):
            *keys, last = "tensors", path.removeprefix("tensors.").format(store.prefix)
        else:
            *keys, last = (store.prefix * (group == "EXITS") + path).split(".")
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

TEXT: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda c: b"", "must be JSON"),
    (lambda c: c[: len(c) // 2], "must be JSON"),
    (lambda c: b"\0" * len(c), "must be JSON"),
    (lambda c: b"[" + c + b"]", "must be a JSON object"),
    (lambda c: b'{"x":' + b"[" * 200_000, "must be JSON"),
    (lambda c: c.replace(b"channel", "chännel".encode()), "must be JSON"),
    (lambda c: c.replace(b"channel", b"ch\xffnnel"), "must be JSON"),
    (lambda c: c.decode().encode("utf-16"), "must be JSON"),
    (lambda c: pickle.dumps(json.loads(c)), "must be JSON"),
    (lambda c: b'{"x": ' + b"9" * 5000 + b"}", "must be JSON"),
    (lambda c: b'{"seal": 1,' + c[1:], "must hold each key once"),
    (lambda c: c[:-1], "seal must be"),
    (lambda c: c + b"\n", "seal must be"),
    (lambda c: c.replace(b'"seal"', b'"sale"'), "seal must be"),
    (lambda c: c.replace(b'"seal": "', b'"seal": "0'), "seal must be"),
    (lambda c: re.sub(b'": ', b'":  ', c), "seal must be"),
    (lambda c: c + b" " * (5 << 20), "must be of at most"),
]  # fmt: skip


def test_hostile_text(store: Store, tmp_path: Path) -> None:
    for change, match in TEXT:
        store.put(tmp_path, change(store.config))
        store.expect_refusal(tmp_path, match)


# Header and tensors, each with the right hash; `n` is a matrix

Header = dict[str, Any]
SIZE, LISTED = "header must be of", "header must be those of the model and the settings"
HEADER: list[tuple[Callable[[Header, bytes, str], bytes], str]] = [
    (lambda h, c, n: b"", f"{SIZE} -"),
    (lambda h, c, n: b"\0" * 8 + c, "must be JSON"),
    (lambda h, c, n: b"\xff" * 8 + packed(h, c)[8:], SIZE),
    (lambda h, c, n: b"\0" * 8 + packed(h, c)[8:], SIZE),
    (lambda h, c, n: packed(h, c)[:40], f"{SIZE} -"),
    (lambda h, c, n: packed(h, c[:-1]), SIZE),
    (lambda h, c, n: packed(h, c + b"\0"), SIZE),
    (lambda h, c, n: pickle.dumps(h), SIZE),
    (lambda h, c, n: packed([], c), "must be a JSON object"),
    (lambda h, c, n: packed(b"[" * 100_000, c), "must be JSON"),
    (lambda h, c, n: packed(b" " * (5 << 20), c), "must be of at most"),
    (lambda h, c, n: packed(json.dumps(h)[:-1].encode() + f', "{n}": 1}}'.encode(), c),
     "must hold each key once"),
    (lambda h, c, n: packed({**h, "__metadata__": {"x": "y"}}, c), LISTED),
    (lambda h, c, n: packed({**h, "x": None}, c), LISTED),
    (lambda h, c, n: packed({"x": h.pop(n), **h}, c), LISTED),
    (lambda h, c, n: packed({k: v for k, v in h.items() if k != n}, c), LISTED),
    (lambda h, c, n: packed({**h, n: None}, c), LISTED),
]  # fmt: skip
ENTRY: list[tuple[str, list[Any]]] = [
    ("x", [1]),
    ("shape", [[-2, 3], [10**30], [2.0, 3.0], [1] * 9, [6], [True]]),
    ("dtype", ["I32", "pickle", None]),
    ("data_offsets", [[0, 4096], [4096, 0], [2**49, 2**49 + 4], [2**63, 2**64], [-4096, 0], "ab"]),
]


def test_hostile_headers(store: Store, tmp_path: Path) -> None:
    name = store.name("w1")
    for rewrite, match in HEADER:
        store.put(tmp_path, weights=rewrite(*unpacked(store.weights), name))
        store.expect_refusal(tmp_path, match)
    for key, value in ((key, value) for key, values in ENTRY for value in values):
        header, content = unpacked(store.weights)
        header[name][key] = value
        store.put(tmp_path, weights=packed(header, content))
        store.expect_refusal(tmp_path, LISTED)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t[:1], torch.full_like(t[1:2], value), t[2:]])


S = "resblocks.0.mlp.c_fc.w_scale"
BAD = (math.nan, math.inf, -math.inf)
TENSOR: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    *((n, filled(v), f"must be finite, got {v}") for v in BAD for n in ("w1", "b1", "gamma")),
    ("b1", Tensor.double, SIZE), ("b1", Tensor.half, SIZE), ("b1", Tensor.int, LISTED),
    ("classes", lambda t: t * 1.01, "classes[0] must be rows of length 1, got 1.0"),
    ("classes", filled(0.0), "classes[1] must be rows of length 1, got 0.0"),
    ("classes", filled(math.nan), "classes[1] must be rows of length 1, got nan"),
    *((S, filled(v), f"w_scale[1] must be finite and above 0, got {v}") for v in (*BAD, -0.5, 0.0)),
    (S, filled(0.5), "state_sha256 must be that of the given model"),
]  # fmt: skip


def test_hostile_tensors(store: Store, tmp_path: Path) -> None:
    for name, change, match in TENSOR:
        if name != S or store.prefix:
            store.put(tmp_path, weights=retyped(store.weights, store.name(name), change))
            store.expect_refusal(tmp_path, match)


# What is not a file, and anything at all


@pytest.mark.parametrize("is_config", [True, False], ids=["config", "weights"])
def test_not_a_regular_file(store: Store, tmp_path: Path, is_config: bool) -> None:
    special = "must be a regular file or a link to one, got"
    for i, (make, match) in enumerate((
        (lambda path: None, "must be a readable"),
        (os.mkdir, special),
        (os.mkfifo, special),
        (lambda path: path.symlink_to("/dev/zero"), special),
        (lambda path: path.symlink_to("nowhere"), "must be a readable"),
        (lambda path: path.symlink_to(path.name), "must be a readable"),
    )):  # fmt: skip
        folder = tmp_path / str(i)
        path = store.put(folder)
        path = folder / store.form.config_name if is_config else path
        path.unlink()
        make(path)
        assert str(path) in store.expect_refusal(folder, match)


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
