"""accelerate(text="int8"): the promises of the image tower, for the text tower."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.layers import build
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.model.acceleration import acceleration_of
from lraee.model.checkpoint import FORMAT
from lraee.storage.files import CheckpointError
from lraee.towers.text import TextTower, find_text
from lraee.towers.text_encoder import TextEncoder
from tests.clip_models import make_images, make_lraee_tiny, make_model, make_texts
from tests.support import assert_same

VARIANTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "custom": {"custom_text": True},
    "raw layer scale": {"text": {"ls_init_value": 0.3, "block_type": "custom"}},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def text_tower(model: nn.Module) -> TextTower:
    tower = find_text(model)
    assert tower is not None
    return tower


def encode(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode_text(ids)


def assert_float(found: nn.Module, expected: nn.Module) -> None:
    """The same numbers in modules of the same names, none of which lraee marked."""
    assert type(found) is type(expected) and acceleration_of(found) is None
    names = [[n for n, _ in model.named_modules()] for model in (found, expected)]
    assert names[0] == names[1]
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert_same(found.state_dict()[name], value, name=name)
    assert not any(isinstance(v, TextEncoder) for m in found.modules() for v in vars(m).values())
    ids = make_texts(3)
    assert_same(encode(found, ids), encode(expected, ids))
    found.train()
    assert text_tower(found).blocks[0].training


@each_variant
def test_the_fast_model_is_of_the_same_class(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = lraee.accelerate(model, text="int8")
    ids = make_texts(5)
    assert type(fast) is type(model)
    blocks = text_tower(fast).blocks
    assert all(isinstance(b, Int8Block) and b.can_fuse and b.is_by_row for b in blocks)
    assert isinstance(blocks[0], type(text_tower(model).blocks[0]))
    cosine = nn.functional.cosine_similarity(encode(fast, ids), encode(model, ids))
    assert cosine.min() > 0.998
    images = make_images(2)
    assert_same(fast.encode_image(images), lraee.accelerate(model).encode_image(images))
    for name, value in model.state_dict().items():
        assert_same(value, before[name], name=name)
    assert not any(isinstance(v, TextEncoder) for v in vars(model).values())


@each_variant
def test_restore_is_bit_for_bit(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    text_tower(model).blocks[0].mlp.c_fc.weight.requires_grad_(False)
    fast = lraee.accelerate(model, text="int8")
    expected = encode(fast, make_texts(1))
    for each in (fast, copy.deepcopy(fast)):
        restored = lraee.restore(each)
        flags = [p.requires_grad for p in model.parameters()]
        assert [p.requires_grad for p in restored.parameters()] == flags
        assert_float(restored.eval(), model.eval())
    assert encode(fast, make_texts(1)).shape == expected.shape


@each_variant
def test_restore_without_the_original(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    base, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    fast = lraee.accelerate(model, inplace=True, text="int8")
    assert fast is model
    for each in (fast, pickle.loads(pickle.dumps(fast))):
        with pytest.raises(LookupError, match="restore: the original model is gone"):
            lraee.restore(each)
        for given in (base, state):
            assert_float(lraee.restore(each, given).eval(), base.eval())
        images_only = {k: v for k, v in state.items() if k.startswith("visual.")}
        with pytest.raises(LookupError, match="restore: base must hold the text tower"):
            lraee.restore(each, images_only)


def test_restore_refuses_a_changed_text_tower() -> None:
    model = make_model()
    base = copy.deepcopy(model)
    fast = lraee.accelerate(model, text="int8")
    with torch.no_grad():
        text_tower(model).blocks[0].mlp.c_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match="restore: the text tower must hold the weights that"):
        lraee.restore(fast)
    assert_float(lraee.restore(fast, base), base)


@each_variant
def test_copies_answer_with_the_same_bits(variant: dict[str, Any]) -> None:
    fast = lraee.accelerate(make_model(**variant), text="int8")
    ids = make_texts(6)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(encode(other, ids), encode(fast, ids))
        owner = text_tower(other).owner
        (encoder,) = (v for v in vars(owner).values() if isinstance(v, TextEncoder))
        assert encoder.owner() is owner
    loaded = lraee.accelerate(make_model(**variant), text="int8")
    loaded.load_state_dict(fast.state_dict())
    assert_same(encode(loaded, ids), encode(fast, ids))


KEPT = lraee.Scheme(keep_float=("text.resblocks.0.mlp.c_fc", "resblocks.1.attn.in_proj"))


@each_variant
@pytest.mark.parametrize("scheme", ["int8", KEPT, "paper"], ids=["int8", "kept float", "paper"])
def test_save_and_load(tmp_path: Path, variant: dict[str, Any], scheme: Any) -> None:
    model = make_model(**variant)
    fast = lraee.accelerate(model, scheme=scheme, text="int8")
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    ids = make_texts(4)
    assert_same(encode(loaded, ids), encode(fast, ids))
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert_float(lraee.restore(loaded).eval(), model.eval())
    kept = text_tower(loaded).blocks[0].mlp.c_fc
    assert isinstance(kept, Int8Linear) == (scheme is not KEPT)


def test_a_checkpoint_without_int8_text_is_that_of_before(tmp_path: Path) -> None:
    model, ids = make_model(), make_texts(4)
    lraee.save(lraee.accelerate(model), tmp_path)
    config = json.loads((tmp_path / FORMAT.config_name).read_text())
    assert "text" not in config and config["format_version"] == 2
    loaded = lraee.load(tmp_path, model)
    assert_same(encode(loaded, ids), encode(lraee.accelerate(model), ids))
    assert not isinstance(text_tower(loaded).blocks[0], Int8Block)


def test_load_refuses_another_text_tower(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(lraee.accelerate(model, text="int8"), tmp_path)
    with torch.no_grad():
        text_tower(model).blocks[0].mlp.c_proj.weight[3, 5] += 1e-3
    with pytest.raises(CheckpointError, match="text.base_sha256 must be that of the text tower"):
        lraee.load(tmp_path, model)


def test_save_refuses_a_text_tower_of_another_type(tmp_path: Path) -> None:
    fast = lraee.accelerate(make_model(custom_text=True), text="int8")
    fast.text.half()
    with pytest.raises(ValueError, match="save: model must be of the type it was accelerated in"):
        lraee.save(fast, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype: torch.dtype) -> None:
    model, ids = make_model().to(dtype), make_texts(4)
    fast = lraee.accelerate(model, text="int8")
    result = encode(fast, ids)
    assert result.dtype == dtype
    assert nn.functional.cosine_similarity(result.float(), encode(model, ids).float()).min() > 0.998
    assert_same(encode(fast, ids[2:3])[0], result[2])


@each_variant
def test_train_is_refused(variant: dict[str, Any]) -> None:
    fast = lraee.accelerate(make_model(**variant), text="int8")
    for module in (fast, *text_tower(fast).guarded, text_tower(fast).blocks[0]):
        with pytest.raises(RuntimeError, match="train: an accelerated tower has int8 weights"):
            module.train()
    assert not any(module.training for module in fast.modules())


def test_a_failed_check_leaves_an_inplace_model_as_it_was(monkeypatch: Any) -> None:
    model = make_model()
    before = copy.deepcopy(model)
    monkeypatch.setattr(build, "quantize_weight", lambda w, *_: _zeros(w))
    with pytest.raises(lraee.FidelityError):
        lraee.accelerate(model, inplace=True, text="int8", check=make_images(8))
    assert_float(model, before)


def _zeros(w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(w.shape, dtype=torch.int8), torch.ones(len(w))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="accelerate: text must be None or int8, got 'int4'"):
        lraee.accelerate(make_model(), text="int4")
    with pytest.raises(NotImplementedError, match="got 'int8': it has no text tower that INT8"):
        lraee.accelerate(make_model().visual, text="int8")
    with pytest.raises(ValueError, match="keep_float must name linears such as"):
        lraee.accelerate(make_model(), scheme=KEPT)
    for options in ({"text": {"embed_cls": True}}, {"text": {"output_tokens": True}}):
        model = make_model(**options, custom_text=True)
        with pytest.raises(NotImplementedError, match="it masks tokens besides later ones, or"):
            lraee.accelerate(model, text="int8")
    model = make_model(custom_text=True)
    model.text.attn_mask[1, 0] = -torch.inf
    with pytest.raises(NotImplementedError, match="attn_mask is neither None nor causal"):
        lraee.accelerate(model, text="int8")
    ids = make_texts(3)
    assert_same(encode(lraee.accelerate(model), ids), encode(model, ids))
    model = make_model(text={"qk_norm": True, "block_type": "custom"})
    with pytest.raises(
        NotImplementedError, match=r"transformer.resblocks.0 has attn.ln_k.*qk_norm"
    ):
        lraee.accelerate(model, text="int8")


def test_exits_take_classes_from_int8_texts() -> None:
    from tests.exits.random_exits import make_exits

    model = make_model()
    fast = lraee.accelerate(model, exits=make_exits(model, kind="confidence"), text="int8")
    ids = make_texts(4)
    fast.set_classes(["a"] * 4, lambda texts: ids)
    expected = nn.functional.normalize(encode(fast, ids), dim=-1)
    torch.testing.assert_close(fast.visual.exits.classes, expected)


def test_on_the_real_model() -> None:
    model = make_lraee_tiny()
    fast = lraee.accelerate(model, text="int8")
    ids = lraee.zoo.load("lraee-tiny")[2](["a photo of a dog.", "a cat", "art of the great owl"])
    result = encode(fast, ids)
    assert nn.functional.cosine_similarity(result, encode(model, ids)).min() > 0.995
    assert_same(torch.cat([encode(fast, row[None]) for row in ids]), result)
