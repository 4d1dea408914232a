"""What was saved comes back bit for bit, exits included; what does not fit is refused."""

import copy
import hashlib
import json
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from torch import nn

import lraee
from lraee import CheckpointError
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.layers import build
from lraee.model.acceleration import acceleration_of
from lraee.model.checkpoint import FORMAT
from lraee.model.trace import has_exits
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, linear_shapes
from lraee.towers.state import tower_hash
from tests.clip_models import VARIANTS, make_images, make_model, make_texts
from tests.exits.random_exits import make_exits
from tests.sealed_files import resealed
from tests.support import assert_same, generator

CONFIG_NAME = FORMAT.config_name
SCHEMES = {
    "int8": "int8",
    "paper": "paper",
    "kept": lraee.Scheme(keep_float=("resblocks.0.mlp.c_fc", "resblocks.0.attn.in_proj")),
    "other": lraee.Scheme(attention="float", symmetric=("c_fc",), clip_weights=True),
}


def accelerated(model: nn.Module, kind: GateKind = "learned") -> nn.Module:
    return lraee.accelerate(model, exits=make_exits(model, kind=kind))


def assert_same_state(result: nn.Module, expected: nn.Module) -> None:
    states = result.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same(tensor, states[1][name], name=name)


def assert_same_model(result: nn.Module, expected: nn.Module) -> None:
    """The same tensors, the same bits out of them, and exits at the same depth."""
    assert_same_state(result, expected)
    images, texts, outputs = make_images(9), make_texts(), []
    for model in (result, expected):
        with torch.no_grad(), lraee.trace(model) if has_exits(model) else nullcontext() as t:
            embeddings = model.encode_image(images), model.encode_text(texts)
        outputs.append((*embeddings, *(() if t is None else (t.exit_block, t.scores))))
    for actual, other in zip(*outputs, strict=True):
        assert_same(actual, other)


# Round trip


@pytest.mark.parametrize("variant", ["plain", "custom_text", "raw_layer_scale", "no_ln_pre"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_round_trip(tmp_path: Path, scheme: Any, variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    before = copy.deepcopy(model)
    fast = lraee.accelerate(model, scheme=scheme)
    lraee.save(fast, tmp_path / "new" / "folder")
    loaded = lraee.load(str(tmp_path / "new" / "folder"), model)
    assert type(loaded) is type(model)
    assert_same_state(model, before)
    assert_same_model(loaded, fast)


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_round_trip_with_exits(tmp_path: Path, kind: GateKind) -> None:
    model = make_model()
    fast = accelerated(model, kind)
    lraee.save(copy.deepcopy(fast), tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same_model(loaded, fast)
    assert (acceleration_of(loaded).exits.classes is None) == (kind in CLASS_FREE)
    lraee.save(loaded, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    assert_same_model(copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))
    assert_same_state(lraee.restore(loaded), model)


def test_a_file_of_version_0_1_loads_with_the_same_bits(tmp_path: Path) -> None:
    """It knew no int8 patch embedding and no int8 text tower."""
    model = make_model()
    fast = accelerated(model)
    lraee.save(fast, tmp_path)
    path = tmp_path / CONFIG_NAME
    config = json.loads(path.read_bytes())
    assert "text" not in config
    for scheme in (config["scheme"], config["exits"]["scheme"]):
        assert scheme.pop("patch_embedding") == "float"
    path.write_bytes(resealed(config))
    assert_same_model(lraee.load(tmp_path, model), fast)


def test_loading_quantizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    fast = lraee.accelerate(model)
    lraee.save(fast, tmp_path)
    monkeypatch.delattr(build, "quantize_weight")
    monkeypatch.delattr(pickle, "Unpickler")
    monkeypatch.setattr(torch, "load", None)
    assert_same_model(lraee.load(tmp_path, model), fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_exits", [False, True])
def test_half_model(tmp_path: Path, dtype: torch.dtype, has_exits: bool) -> None:
    model = make_model().to(dtype)
    exits = make_exits(model, kind="patience") if has_exits else None
    fast = lraee.accelerate(model, exits=exits)
    lraee.save(fast, tmp_path)
    images = make_images(5).to(dtype)
    with torch.no_grad():
        expected = fast.encode_image(images)
        assert_same(lraee.load(tmp_path, model).encode_image(images), expected)


@pytest.mark.parametrize("has_exits", [False, True])
def test_tower_alone(tmp_path: Path, has_exits: bool) -> None:
    tower = make_model().visual
    exits = make_exits(tower, kind="patience") if has_exits else None
    fast = lraee.accelerate(tower, exits=exits)
    lraee.save(fast, tmp_path)
    images = make_images(5)
    with torch.no_grad():
        assert_same(lraee.load(tmp_path, tower)(images), fast(images))


def test_every_linear_kept_float(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 1})
    scheme = lraee.Scheme(keep_float=tuple(linear_shapes(model.visual)))
    fast = lraee.accelerate(model, scheme=scheme)
    lraee.save(fast, tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)


def test_backend_of_the_saved_model_or_another(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 1})
    fast = lraee.accelerate(model, backend="reference")
    lraee.save(fast, tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)
    assert_same_state(lraee.load(tmp_path, model, backend="auto"), lraee.accelerate(model))


def test_compiled_models_share_checkpoints_with_plain_ones(tmp_path: Path) -> None:
    """torch.compile renames every parameter, here without compiling anything."""
    model = make_model(vision={"layers": 1})
    fast = lraee.accelerate(model)
    lraee.save(torch.compile(fast), tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)
    whole = copy.deepcopy(model)
    whole.visual = torch.compile(whole.visual)
    for compiled in (torch.compile(model), whole):
        state = lraee.load(tmp_path, compiled).state_dict()
        result = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        assert result.keys() == fast.state_dict().keys()
        for name, tensor in fast.state_dict().items():
            assert_same(result[name], tensor, name=name)


# What is saved


def test_only_int8_weights_and_scales_are_in_the_file(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(lraee.accelerate(model), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert set(tensors) == set(config["tensors"])
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int8 if name.endswith(".w_q") else torch.float32)
    linears = sum(N * K + 4 * N for N, K in linear_shapes(model.visual).values())
    assert linears <= path.stat().st_size <= linears + 4096
    assert config["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert config["base_sha256"] == tower_hash(model.visual.state_dict())
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("kind", ["learned", "agreement"])
def test_the_classes_of_now_are_saved(tmp_path: Path, kind: GateKind) -> None:
    model = make_model()
    fast = accelerated(model, kind)
    fast.set_classes(torch.randn(4, embedding_size(fast.visual), generator=generator(3)) * 10)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same(acceleration_of(loaded).exits.classes, fast.visual.exits.classes)
    assert_same_model(loaded, fast)


def test_saving_again_replaces_the_old_and_leaves_other_files(tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "README.md").write_text("mine")
    plain, paper = (lraee.accelerate(model, scheme=scheme) for scheme in ("int8", "paper"))
    for fast in (plain, paper, paper, accelerated(model), plain):
        lraee.save(fast, tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        assert_same_model(lraee.load(tmp_path, model), fast)


def test_save_refuses_what_load_would(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="^save: model must be accelerated, got a float one$"):
        lraee.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"^save: model must be of the type .* got torch.float16"):
        lraee.save(lraee.accelerate(model).half(), tmp_path)
    fast = lraee.accelerate(model)
    blocks_of(fast.visual)[1].mlp.c_fc.w_scale[3] = math.nan
    with pytest.raises(ValueError, match=r"^save: resblocks.1.mlp.c_fc.w_scale\[3\] must be fin"):
        lraee.save(fast, tmp_path)
    fast = accelerated(model)
    fast.visual.exits.classes[2] = 7.0
    with pytest.raises(ValueError, match=r"^save: exits.classes\[2\] must be rows of length"):
        lraee.save(fast, tmp_path)
    assert not list(tmp_path.iterdir())


def test_head_beyond_the_tower(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(accelerated(model), tmp_path)
    path, (weights,) = tmp_path / CONFIG_NAME, tmp_path.glob("*.safetensors")
    data = weights.read_bytes().replace(b"exits.heads.2.", b"exits.heads.9.")
    config = json.loads(path.read_bytes().replace(b"exits.heads.2.", b"exits.heads.9."))
    config["exits"]["heads"][1]["block"] = 9
    config["exits"]["plans"]["learned"]["blocks"] = [1, 9]
    sha256 = config["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / FORMAT.weights_name(sha256)).write_bytes(data)
    path.write_bytes(resealed(config))
    with pytest.raises(CheckpointError, match="exits must stand before the last of"):
        lraee.load(tmp_path, model)
