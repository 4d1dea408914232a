"""Files of exits that are not ours are refused in one line: never a crash, never taken."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lraee.exits.bundle import Exits
from lraee.exits.serialization import FORMAT
from tests.exits.small_exits import nested, small_exits
from tests.sealed_files import (
    NOT_REGULAR,
    Edit,
    Files,
    Rewrite,
    check_seal_is_ours,
    expect_refusal,
    filled,
    make_irregular,
    mutants,
    put,
    read_files,
    resealed,
    retyped,
    rewritten,
    text_cases,
    weights_cases,
    weights_name,
)

# Hostile files, each with all hashes right


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("saved")
    small_exits().save(folder)
    return read_files(folder, FORMAT)


def refused(folder: Path, match: str = "^load: ") -> str:
    return expect_refusal(partial(Exits.load, folder), match)


def top(**changed: Any) -> Edit:
    return lambda c: c.update(changed)


def head(**changed: Any) -> Edit:
    """The head at block 5, the second."""
    return lambda c: c["heads"][1].update(changed)


def plan(**changed: Any) -> Edit:
    return lambda c: c["plans"]["b = 0.5"].update(changed)


def row(value: Any) -> Edit:
    return lambda c: c["plans"]["b = 0.5"]["weights"].__setitem__(1, value)


def threshold(value: Any) -> Edit:
    return lambda c: c["plans"]["b = 0.5"]["thresholds"].__setitem__(1, value)


def heads(*blocks: Any) -> Edit:
    return lambda c: c.update(heads=[{**c["heads"][0], "block": block} for block in blocks])


BUSHY: Any = [[[[[["x" * 9] * 6] * 6] * 6] * 6] * 6] * 6
COUNT = "must be an integer from 1 to"
NUMBER = "must be a finite float32 number"

CONFIG_CASES: dict[str, tuple[Edit, str]] = {
    "other format": (top(format="lraee int8 checkpoint"), "format must be 'lraee exits'"),
    "future version": (top(format_version=2), "format_version must be 1"),
    "version true": (top(format_version=True), "format_version"),
    "unknown key": (top(pickle="x"), "must have no key but its own"),
    "weights hash is a path": (top(weights_sha256="../" * 21 + "x"), "64 hexadecimal"),
    "weights hash of others": (top(weights_sha256="0" * 64), "must be a regular file"),
    "size a float": (top(weights_bytes=1e3), "weights_bytes must be an integer"),
    "size huge": (top(weights_bytes=10**30), "must be of 1000"),
    "tensors null": (top(tensors=None), "tensors must be those of the heads and classes"),
    "tensor missing": (lambda c: c["tensors"].popitem(), "tensors must be those"),
    "tensor unknown": (lambda c: c["tensors"].update(x=["F32", [1]]), "tensors must be those"),
    "tensor of int8": (lambda c: c["tensors"].update(classes=["I8", [5, 6]]), "must be those"),
    # Heads
    "heads an object": (top(heads={}), "heads must be a list of 1 to 64"),
    "heads empty": (top(heads=[]), "heads must be a list of 1 to 64"),
    "heads bushy": (top(heads=[BUSHY]), r"heads\[0\] must be an object"),
    "heads 65": (heads(*range(1, 66)), "heads must be a list of 1 to 64"),
    "head a list": (lambda c: c["heads"].__setitem__(1, []), r"heads\[1\] must be an object"),
    "head has more": (head(x=1), r"heads\[1\] must have no key but its own"),
    "head has less": (lambda c: c["heads"][1].pop("hidden"), "must have the key hidden"),
    "head missing": (lambda c: c["heads"].pop(), "tensors must be those"),
    "block 0": (heads(0), COUNT),
    "block 513": (heads(513), COUNT),
    "block negative": (heads(-1), COUNT),
    "block true": (heads(True), COUNT),
    "block a float": (heads(2.0), COUNT),
    "block text": (heads("2"), COUNT),
    "block null": (heads(None), COUNT),
    "block a list": (heads([2]), COUNT),
    "block twice": (heads(2, 2), "must ascend"),
    "blocks descend": (heads(5, 2), "must ascend"),
    "block moved": (head(block=6), "tensors must be those"),
    "inputs 0": (head(inputs=0), COUNT),
    "inputs huge": (head(inputs=10**30), COUNT),
    "inputs true": (head(inputs=True), COUNT),
    "inputs a float": (head(inputs=8.0), COUNT),
    "inputs of no D": (head(inputs=12), "must be D or 2 D"),
    "inputs 4 D": (head(inputs=32), "must be D or 2 D"),
    "inputs turned": (head(inputs=16), "tensors must be those"),
    "hidden 0": (head(hidden=0), COUNT),
    "hidden true": (head(hidden=True), COUNT),
    "hidden text": (head(hidden="3"), COUNT),
    "hidden a float": (head(hidden=3.0), COUNT),
    "hidden another": (head(hidden=4), "tensors must be those"),
    "hidden null": (head(hidden=None), "tensors must be those"),
    "embedding 0": (top(embedding=0), COUNT),
    "embedding null": (top(embedding=None), COUNT),
    "embedding true": (top(embedding=True), COUNT),
    "embedding another": (top(embedding=7), "tensors must be those"),
    "heads of 100 TB": (
        lambda c: [h.update(inputs=65536, hidden=65536) for h in c["heads"]],
        "at most 1073741824 bytes",
    ),
    # Classes
    "classes 0": (top(classes=0), COUNT),
    "classes true": (top(classes=True), COUNT),
    "classes a list": (top(classes=[]), COUNT),
    "classes 2**25": (top(classes=2**25), COUNT),
    "classes 2**24": (top(classes=2**24, embedding=65536), "at most 1073741824 bytes"),
    "classes null": (top(classes=None), "tensors must be those"),
    "classes more": (top(classes=6), "tensors must be those"),
    # Plans
    "plans a list": (top(plans=[]), "plans must be an object"),
    "plans empty": (top(plans={}), "plans must be an object"),
    "plans 257": (
        lambda c: c["plans"].update({str(i): c["plans"]["all"] for i in range(255)}),
        "1 to 256 plans",
    ),
    "plan null": (lambda c: c["plans"].update(x=None), "plans.x must be an object"),
    "plan name empty": (lambda c: c["plans"].update({"": {}}), "printable ASCII"),
    "plan name of 65": (lambda c: c["plans"].update({"x" * 65: {}}), "printable ASCII"),
    "plan name of 1 MB": (lambda c: c["plans"].update({"x" * 1_000_000: {}}), "printable ASCII"),
    "plan name with an escape": (lambda c: c["plans"].update({"\x1b[2J": {}}), "printable ASCII"),
    "plan name of two lines": (lambda c: c["plans"].update({"a\nb": {}}), "printable ASCII"),
    "plan name not ASCII": (lambda c: c["plans"].update({"é": {}}), "printable ASCII"),
    "plan has more": (plan(x=1), "no key but its own"),
    "plan has less": (lambda c: c["plans"]["all"].pop("kind"), "must have the key kind"),
    "plan blocks null": (plan(blocks=None), "blocks must be a list"),
    "plan blocks of another": (plan(blocks=[2, 5, 7]), "must use heads that are there"),
    "plan blocks descend": (plan(blocks=[11, 5, 2]), "must ascend"),
    "plan block twice": (plan(blocks=[2, 5, 5]), "must ascend"),
    "plan block true": (plan(blocks=[True, 5, 11]), COUNT),
    "plan block a float": (plan(blocks=[2.0, 5, 11]), COUNT),
    "plan block 0": (plan(blocks=[0, 5, 11]), COUNT),
    "plan block 513": (plan(blocks=[2, 5, 513]), COUNT),
    "plan blocks fewer": (plan(blocks=[2, 5]), "one row per exit"),
    "plan blocks 65": (plan(blocks=list(range(1, 66))), "blocks must be a list of 0 to 64"),
    "kind unknown": (plan(kind="oracle"), "kind must be one of learned"),
    "kind null": (plan(kind=None), "kind must be one of"),
    "kind a list": (plan(kind=["learned"]), "kind must be one of"),
    "kind an object": (plan(kind={}), "kind must be one of"),
    "kind of 1 MB": (plan(kind="x" * 1_000_000), "kind must be one of"),
    "kind bushy": (plan(kind=BUSHY), "kind must be one of"),
    "static with three exits": (plan(kind="static"), "static gate must have one exit"),
    "weights null": (plan(weights=None), "weights must be a list"),
    "weights fewer": (lambda c: c["plans"]["b = 0.5"]["weights"].pop(), "one row per exit"),
    "weights 65": (plan(weights=[[0.0] * 4] * 65), "weights must be a list of 0 to 64"),
    "row null": (row(None), r"weights\[1\] must be a list of 4 to 4"),
    "row of 3": (row([0.0] * 3), r"weights\[1\] must be a list of 4 to 4"),
    "row of 5": (row([0.0] * 5), r"weights\[1\] must be a list of 4 to 4"),
    "row bushy": (row([BUSHY, 0.0, 0.0, 0.0]), NUMBER),
    "row of integers": (row([0, 0, 0, 0]), NUMBER),
    "row of flags": (row([True] * 4), NUMBER),
    "row of text": (row(["0.0"] * 4), NUMBER),
    "row of nulls": (row([None] * 4), NUMBER),
    "weight beyond float32": (row([0.0, 0.0, 0.0, 3.5e38]), NUMBER),
    "weight NaN": (row([math.nan, 0.0, 0.0, 0.0]), "seal must be"),
    "weight inf": (row([math.inf, 0.0, 0.0, 0.0]), "seal must be"),
    "weight inf as text": (row(["inf", 0.0, 0.0, 0.0]), NUMBER),
    "thresholds null": (plan(thresholds=None), "thresholds must be a list"),
    "thresholds more": (plan(thresholds=[0.5] * 4), "one row per exit"),
    "threshold an integer": (threshold(1), NUMBER),
    "threshold true": (threshold(True), NUMBER),
    "threshold null": (threshold(None), NUMBER),
    "threshold a list": (threshold([0.5]), NUMBER),
    "threshold of text": (threshold("0.5"), NUMBER),
    "threshold nan as text": (threshold("nan"), NUMBER),
    "threshold Inf as text": (threshold("Infinity"), NUMBER),
    "threshold NaN": (threshold(math.nan), "seal must be"),
    "threshold inf": (threshold(math.inf), "seal must be"),
    "threshold not in float32": (threshold(0.1), "must be exact in float32, got 0.1"),
    "threshold beyond float32": (threshold(1e39), NUMBER),
    "threshold too small": (threshold(1e-60), "must be exact in float32"),
    "chosen null": (top(chosen=None), "chosen must be 1 to 64 printable"),
    "chosen a list": (top(chosen=["all"]), "chosen must be 1 to 64 printable"),
    "chosen an object": (top(chosen={}), "chosen must be 1 to 64 printable"),
    "chosen unknown": (top(chosen="b"), "chosen must be one of"),
    "chosen of 1 MB": (top(chosen="x" * 1_000_000), "chosen must be 1 to 64 printable"),
    # Numbers and settings
    "logit scale 0": (top(logit_scale=0.0), "logit_scale must be above 0"),
    "logit scale negative": (top(logit_scale=-1.0), "logit_scale must be above 0"),
    "logit scale an integer": (top(logit_scale=100), NUMBER),
    "logit scale true": (top(logit_scale=True), NUMBER),
    "logit scale null": (top(logit_scale=None), NUMBER),
    "logit scale text": (top(logit_scale="inf"), NUMBER),
    "logit scale beyond float32": (top(logit_scale=1e300), NUMBER),
    "logit scale NaN": (top(logit_scale=math.nan), "seal must be"),
    "share negative": (top(copy_share=-0.25), "copy_share must be at least 0"),
    "share an integer": (top(copy_share=0), NUMBER),
    "share false": (top(copy_share=False), NUMBER),
    "share inf": (top(copy_share=math.inf), "seal must be"),
    "share beyond float32": (top(copy_share=1e300), NUMBER),
    "scheme null": (top(scheme=None), "scheme must be an object"),
    "scheme a name": (top(scheme="int8"), "scheme must be an object"),
    "scheme has more": (lambda c: c["scheme"].update(x=1), "no key but its own"),
    "scheme has less": (lambda c: c["scheme"].pop("weights"), "must have the key weights"),
    "scheme other choice": (lambda c: c["scheme"].update(weights="row"), "must be one of channel"),
    "scheme of 1 MB": (lambda c: c["scheme"].update(weights="x" * 1_000_000), "must be one of"),
    "scheme flag 0": (lambda c: c["scheme"].update(clip_weights=0), "must be of type bool"),
    "scheme site a list": (lambda c: c["scheme"].update(symmetric=[[]]), "must hold strings"),
    "hash short": (top(base_hash="ab"), "base_hash must be 64"),
    "hash null": (top(base_hash=None), "base_hash must be 64"),
    "hash a list": (top(base_hash=["a"] * 64), "base_hash must be 64"),
    "hash in capitals": (top(base_hash="AB" * 32), "base_hash must be 64"),
    # Card
    "card null": (top(card=None), "card must be an object"),
    "card a list": (top(card=[]), "card must be an object"),
    "card text": (top(card="{}"), "card must be an object"),
    "card NaN": (top(card={"x": math.nan}), "seal must be"),
    "card inf": (top(card={"x": [-math.inf]}), "seal must be"),
    "card deep": (top(card={"x": nested(32)}), "card must be at most 32 levels"),
    "card large": (top(card={"x": "y" * (1 << 20)}), "card must be of at most 1048576 bytes"),
    "card of many": (top(card={"x": [0] * 400_000}), "card must be of at most 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_hostile_config(files: Files, tmp_path: Path, case: str) -> None:
    edit, match = CONFIG_CASES[case]
    config = json.loads(files.config)
    edit(config)
    name = weights_name(FORMAT, files.config)
    put(tmp_path, FORMAT, resealed(config), files.weights, name)
    refused(tmp_path, match)


TEXT_CASES = text_cases(FORMAT.version)


@pytest.mark.parametrize("case", TEXT_CASES)
def test_hostile_text(files: Files, tmp_path: Path, case: str) -> None:
    edit, match = TEXT_CASES[case]
    name = weights_name(FORMAT, files.config)
    put(tmp_path, FORMAT, edit(files.config), files.weights, name)
    refused(tmp_path, match)


def each(value: float) -> dict[str, tuple[Rewrite, str]]:
    """One number in each tensor of one head, and in the classes, is this."""
    names = [*(f"heads.5.{name}" for name in ("gamma", "beta", "w1", "b1", "w2", "b2")), "classes"]
    return {
        f"{name} {value}": (retyped(name, filled(value)), f"{name} must be finite, got {value}")
        for name in names
    }


def scaled(factor: float) -> Rewrite:
    return retyped("classes", lambda t: t * torch.tensor([1, 1, factor, 1, 1])[:, None])


WEIGHTS_CASES: dict[str, tuple[Rewrite, str]] = {
    **weights_cases("heads.5.w1", "F32"),
    **each(math.nan),
    **each(math.inf),
    **each(-math.inf),
    "head of doubles": (retyped("heads.2.b1", Tensor.double), "must be F32"),
    "head of halves": (retyped("heads.2.b1", Tensor.half), "must be F32"),
    "head of integers": (retyped("heads.2.b1", Tensor.int), "must be F32"),
    "class too long": (scaled(1.01), r"classes\[2\] must have length 1, got 1.0"),
    "class too short": (scaled(0.99), r"classes\[2\] must have length 1, got 0.9"),
    "class 0": (scaled(0.0), r"classes\[2\] must have length 1, got 0.0"),
    "class huge": (scaled(1e38), r"classes\[2\] must have length 1"),
}


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_hostile_weights(files: Files, tmp_path: Path, case: str) -> None:
    rewrite, match = WEIGHTS_CASES[case]
    put(tmp_path, FORMAT, *rewritten(files, rewrite))
    refused(tmp_path, match)


def test_forged_files_are_taken_where_nothing_is_wrong(files: Files, tmp_path: Path) -> None:
    """So that what is refused above is refused for what it says, and not for its seal."""
    check_seal_is_ours(files.config)
    put(tmp_path, FORMAT, *rewritten(files, scaled(1.0005)))
    Exits.load(tmp_path)


def test_weights_of_other_exits_are_refused(files: Files, tmp_path: Path) -> None:
    small_exits(seed=1).save(tmp_path)
    other = read_files(tmp_path, FORMAT)
    (tmp_path / weights_name(FORMAT, other.config)).write_bytes(files.weights)
    refused(tmp_path, "must have sha256")


# What is not a file, and anything at all


@pytest.mark.parametrize("file", [0, 1], ids=["config", "weights"])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_not_a_regular_file(files: Files, tmp_path: Path, file: int, kind: str) -> None:
    folder = tmp_path / "exits"
    folder.mkdir()
    path = put(folder, FORMAT, *files)[file]
    make_irregular(path, kind)
    assert str(path) in refused(folder, "must be a regular file, no link")


@pytest.mark.parametrize("file", [0, 1], ids=["config", "weights"])
def test_cut_off_flipped_or_mutated_anywhere(files: Files, tmp_path: Path, file: int) -> None:
    path, data, source = put(tmp_path, FORMAT, *files)[file], files[file], random.Random(0)
    Exits.load(tmp_path)
    for at in source.sample(range(len(data)), 250):
        flipped = bytearray(data)
        flipped[at] ^= 1 << source.randrange(8)
        for mutant in (data[:at], bytes(flipped)):
            path.write_bytes(mutant)
            refused(tmp_path)
    for mutant in mutants(data, 500):
        path.write_bytes(mutant)
        refused(tmp_path)
