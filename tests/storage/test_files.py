"""A checkpoint that is not one of ours is refused in one line: never a crash, never taken."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.model.checkpoint import FORMAT
from tests.clip_models import make_model
from tests.sealed_files import (
    NOT_REGULAR,
    Edit,
    Files,
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

Saved = tuple[nn.Module, Files]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model, and the two files of its checkpoint."""
    torch.manual_seed(0)
    model = make_model(vision={"layers": 1, "width": 32})
    folder = tmp_path_factory.mktemp("saved")
    lraee.save(lraee.accelerate(model), folder)
    return model, read_files(folder, FORMAT)


def refused(folder: Path, model: nn.Module, match: str = "^load: ") -> str:
    return expect_refusal(partial(lraee.load, folder, model), match)


CONFIG_CASES: dict[str, tuple[Edit, str]] = {
    "other format": (lambda c: c.update(format="pickle"), "format must be"),
    "format missing": (lambda c: c.pop("format"), "format must be"),
    "future version": (lambda c: c.update(format_version=3), "format_version must be 2"),
    "past version": (lambda c: c.update(format_version=1), "format_version must be 2"),
    "version 0": (lambda c: c.update(format_version=0), "format_version"),
    "version true": (lambda c: c.update(format_version=True), "format_version"),
    "version 2.0": (lambda c: c.update(format_version=2.0), "format_version"),
    "version as text": (lambda c: c.update(format_version="2"), "format_version"),
    "unknown key": (lambda c: c.update(pickle="x"), "must have no key but its own"),
    "no scheme": (lambda c: c.pop("scheme"), "must have the key scheme"),
    "no tensors": (lambda c: c.pop("tensors"), "must have the key tensors"),
    "no exits": (lambda c: c.pop("exits"), "must have the key exits"),
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
def test_hostile_config(saved: Saved, tmp_path: Path, case: str) -> None:
    model, files = saved
    edit, match = CONFIG_CASES[case]
    config = json.loads(files.config)
    edit(config)
    put(tmp_path, FORMAT, resealed(config), files.weights, weights_name(FORMAT, files.config))
    refused(tmp_path, model, match)


TEXT_CASES = text_cases(FORMAT.version)


@pytest.mark.parametrize("case", TEXT_CASES)
def test_hostile_text(saved: Saved, tmp_path: Path, case: str) -> None:
    model, files = saved
    edit, match = TEXT_CASES[case]
    name = weights_name(FORMAT, files.config)
    put(tmp_path, FORMAT, edit(files.config), files.weights, name)
    refused(tmp_path, model, match)


W, S = "resblocks.0.mlp.c_fc.w_q", "resblocks.0.mlp.c_fc.w_scale"

WEIGHTS_CASES = {
    **weights_cases(W, "I8"),
    "scale of doubles": (retyped(S, Tensor.double), "must be F32"),
    "scale of halves": (retyped(S, Tensor.half), "must be F32"),
    "scale of other size": (retyped(S, lambda t: t[:-1].clone()), "must be F32"),
    "scale NaN": (retyped(S, filled(math.nan)), r"w_scale\[1\] must be finite and above 0, got n"),
    "scale Inf": (retyped(S, filled(math.inf)), r"w_scale\[1\] must be finite and above 0, got i"),
    "scale negative": (retyped(S, filled(-0.5)), r"w_scale\[1\] must be finite and above 0"),
    "scale 0": (retyped(S, filled(0.0)), r"w_scale\[1\] must be finite and above 0, got 0.0"),
    "weight another": (retyped(W, filled(5)), "state_sha256 must be that of the given model"),
    "scale another": (retyped(S, filled(0.5)), "state_sha256 must be that of the given model"),
}


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_hostile_weights(saved: Saved, tmp_path: Path, case: str) -> None:
    """Each with the hashes of lraee.json made right again, so that the check itself must refuse."""
    model, files = saved
    rewrite, match = WEIGHTS_CASES[case]
    put(tmp_path, FORMAT, *rewritten(files, rewrite))
    refused(tmp_path, model, match)


def test_cases_are_as_many_as_promised(saved: Saved) -> None:
    assert len(CONFIG_CASES) + len(TEXT_CASES) + len(WEIGHTS_CASES) >= 60
    check_seal_is_ours(saved[1].config)


@pytest.mark.parametrize("file", [0, 1], ids=["config", "weights"])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_not_a_regular_file(saved: Saved, tmp_path: Path, file: int, kind: str) -> None:
    model, files = saved
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    path = put(folder, FORMAT, *files)[file]
    make_irregular(path, kind)
    assert str(path) in refused(folder, model, "must be a regular file, no link")


def test_no_such_folder(saved: Saved, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", saved[0], "must be a regular file")


def test_other_float_weights_are_refused(saved: Saved, tmp_path: Path) -> None:
    model, files = saved
    put(tmp_path, FORMAT, *files)
    torch.manual_seed(1)
    refused(tmp_path, make_model(), "image tower of the given model")
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
        refused(tmp_path, other, match)
    refused(tmp_path, copy.deepcopy(model).half(), "image tower")
    with pytest.raises(ValueError, match="accelerated already"):
        lraee.load(tmp_path, lraee.accelerate(model))


@pytest.mark.parametrize("file", [0, 1], ids=["config", "weights"])
def test_a_thousand_mutations(saved: Saved, tmp_path: Path, file: int) -> None:
    """Bytes changed, cut out, doubled or swapped at random: each is refused, none crashes."""
    model, files = saved
    path = put(tmp_path, FORMAT, *files)[file]
    lraee.load(tmp_path, model)
    for mutant in mutants(files[file], 1000):
        path.write_bytes(mutant)
        refused(tmp_path, model)
