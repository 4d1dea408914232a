"""What was saved comes back bit for bit, and a save that is cut off breaks nothing."""

import copy
import hashlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lraee
from lraee.layers import build
from lraee.model.checkpoint import FORMAT
from lraee.towers.families import blocks_of, linear_shapes
from lraee.towers.state import tower_hash
from tests.clip_models import VARIANTS, make_images, make_model, make_texts
from tests.support import assert_same

CONFIG_NAME = FORMAT.config_name

KEPT = lraee.Scheme(keep_float=("resblocks.0.mlp.c_fc", "resblocks.0.attn.in_proj"))
SCHEMES = {
    "int8": "int8",
    "paper": "paper",
    "kept float": KEPT,
    "other options": lraee.Scheme(attention="float", symmetric=("c_fc",), clip_weights=True),
}


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    """The same tensors, and the same bits out of them."""
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same(tensor, states[1][name], name=name)
    images, texts = make_images(3), make_texts()
    with torch.no_grad():
        assert_same(found.encode_image(images), expected.encode_image(images))
        assert_same(found.encode_text(texts), expected.encode_text(texts))


# What is saved


@pytest.mark.parametrize("variant", ["plain", "custom_text", "raw_layer_scale", "no_ln_pre"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_round_trip(tmp_path: Path, scheme: Any, variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = lraee.accelerate(model, scheme=scheme)
    lraee.save(fast, tmp_path / "new" / "folder")
    loaded = lraee.load(str(tmp_path / "new" / "folder"), model)
    assert type(loaded) is type(model)
    assert_same_model(loaded, fast)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)


def test_loading_quantizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    fast = lraee.accelerate(model)
    lraee.save(fast, tmp_path)
    monkeypatch.delattr(build, "quantize_weight")
    monkeypatch.delattr(pickle, "Unpickler")
    monkeypatch.setattr(torch, "load", None)
    assert_same_model(lraee.load(tmp_path, model), fast)


def test_loaded_model_is_an_accelerated_one(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(lraee.accelerate(model), tmp_path)
    loaded = lraee.load(tmp_path, model)
    restored = lraee.restore(loaded)
    for name, tensor in model.state_dict().items():
        assert_same(restored.state_dict()[name], tensor, name=name)
    lraee.save(loaded, tmp_path / "again")
    first, second = ((d / CONFIG_NAME).read_bytes() for d in (tmp_path, tmp_path / "again"))
    assert first == second
    assert_same_model(pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    fast = lraee.accelerate(model)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    images = make_images(2).to(dtype)
    with torch.no_grad():
        assert_same(loaded.encode_image(images), fast.encode_image(images))


def test_every_linear_kept_float(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 1})
    names = tuple(linear_shapes(model.visual))
    fast = lraee.accelerate(model, scheme=lraee.Scheme(keep_float=names))
    lraee.save(fast, tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)


def test_tower_alone(tmp_path: Path) -> None:
    tower = make_model().visual
    fast = lraee.accelerate(tower)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, tower)
    images = make_images(2)
    with torch.no_grad():
        assert_same(loaded(images), fast(images))


def test_only_int8_weights_and_steps_are_in_the_file(tmp_path: Path) -> None:
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


def test_backend_of_the_saved_model_or_another(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 1})
    fast = lraee.accelerate(model, backend="reference")
    lraee.save(fast, tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)
    auto = lraee.load(tmp_path, model, backend="auto")
    for name, tensor in lraee.accelerate(model).state_dict().items():
        assert_same(auto.state_dict()[name], tensor, name=name)


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
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_the_old_and_leaves_other_files(tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "README.md").write_text("mine")
    for scheme in ("int8", "paper", "paper", "int8"):
        fast = lraee.accelerate(model, scheme=scheme)
        lraee.save(fast, tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        assert_same_model(lraee.load(tmp_path, model), fast)


def test_compiled_models_share_checkpoints_with_plain_ones(tmp_path: Path) -> None:
    """torch.compile renames every parameter, here without compiling anything."""
    model = make_model(vision={"layers": 1})
    fast = lraee.accelerate(model)
    lraee.save(torch.compile(fast), tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)
    lraee.save(fast, tmp_path)
    whole = copy.deepcopy(model)
    whole.visual = torch.compile(whole.visual)
    for compiled in (torch.compile(model), whole):
        state = lraee.load(tmp_path, compiled).state_dict()
        result = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        assert result.keys() == fast.state_dict().keys()
        for name, tensor in fast.state_dict().items():
            assert_same(result[name], tensor, name=name)
