"""Every known class of transformers: accelerated, called in each of its ways, and restored."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.layers.int8_block import Int8Block
from lraee.towers.families import block_specs, blocks_of, encode_image, find_tower, tower_spec
from lraee.towers.flops import count_macs
from tests.support import assert_same
from tests.towers.hugging_face_models import (
    IS_5,
    MODELS,
    PREFIX,
    accelerated,
    given,
    make,
    pictures,
    transformers,
)

pytestmark = pytest.mark.usefixtures("no_grad")
every = pytest.mark.parametrize("name", MODELS)
_GATED = ("Dinov2 giant", "DINOv3 gated")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def _vision_call(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """The output of whatever holds the vision model and can record its layers."""
    if hasattr(model, "vision_tower") or hasattr(getattr(model, "model", None), "vision_tower"):
        model = getattr(model, "vision_tower", None) or model.model.vision_tower
    elif hasattr(model, "get_text_features"):
        model = model.vision_model
    inputs = given(model, x)
    if type(model).__name__.endswith("Siglip2VisionTransformer"):
        inputs["attention_mask"] = inputs.pop("pixel_attention_mask")
    return model(**inputs, **options)


@every
def test_embeddings_are_close_and_have_the_same_bits_in_any_batch(name: str) -> None:
    model, x = make(name), pictures()
    before = copy.deepcopy(model.state_dict())
    fast = lraee.accelerate(model)
    assert isinstance(fast, type(model))
    expected, y = encode_image(model, x), encode_image(fast, x)
    error = (y - expected).norm() / expected.norm()
    assert 0 < error < (0.06 if name in _GATED else 0.03)
    for i in range(len(x)):
        assert_same(encode_image(fast, x[i : i + 1])[0], y[i])
    assert_same(encode_image(fast, torch.cat([x[3:], x[:3], x[3:]]))[:5], torch.cat([y[3:], y[:3]]))
    for key, tensor in model.state_dict().items():
        assert_same(tensor, before[key])


@every
def test_blocks_are_instances_of_the_library_s_classes(name: str) -> None:
    model = make(name)
    fast = accelerated(name)
    spec = tower_spec(find_tower(fast))
    assert spec.prefix_tokens == PREFIX.get(name, 1)
    for mine, theirs in zip(blocks_of(find_tower(fast)), blocks_of(find_tower(model)), strict=True):
        assert isinstance(mine, Int8Block) and isinstance(mine, type(theirs)) and mine.can_fuse
    assert type(find_tower(fast)).__mro__[2:] != () and spec.float_class is type(find_tower(model))


@every
def test_restored_copied_and_pickled(name: str) -> None:
    model, x = make(name), pictures(2)
    fast = accelerated(name)
    y = encode_image(fast, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(encode_image(other, x), y)
        assert other.state_dict().keys() == fast.state_dict().keys()
    for back in (lraee.restore(fast), lraee.restore(fast, find_tower(model).state_dict())):
        assert type(back) is type(model)
        assert back.state_dict().keys() == model.state_dict().keys()
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert_same(encode_image(back, x), encode_image(model, x))


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = make(name), pictures(2)
    fast = lraee.accelerate(model, scheme="int8-patches")
    lraee.save(fast, tmp_path)
    assert_same(encode_image(lraee.load(tmp_path, model), x), encode_image(fast, x))


@every
def test_int8_patches(name: str) -> None:
    model, x = make(name), pictures()
    fast = lraee.accelerate(model, scheme="int8-patches")
    expected, y = encode_image(model, x), encode_image(fast, x)
    assert 0 < (y - expected).norm() / expected.norm() < (0.07 if name in _GATED else 0.05)
    assert_same(encode_image(fast, x[2:3])[0], y[2])
    assert count_macs(find_tower(fast)).linear > count_macs(find_tower(accelerated(name))).linear


@every
def test_nan_stays_in_its_image(name: str) -> None:
    x = pictures()
    fast = accelerated(name)
    y = encode_image(fast, x)
    x[2, 1, 5, 7] = torch.nan
    z = encode_image(fast, x)
    others = [0, 1, 3, 4]
    assert_same(z[others], y[others])
    assert z[2].isnan().any()


@every
@pytest.mark.parametrize("when", ["never before", "on the float model before"])
def test_hidden_states_are_all_there(name: str, when: str) -> None:
    """LLaVA and IP-Adapter read hidden_states[-2]."""
    model, x = make(name), pictures(2)
    expected = _vision_call(make(name), x, output_hidden_states=True).hidden_states
    if expected is None:
        pytest.skip(f"transformers {transformers.__version__} records none of its inner model")
    if when == "on the float model before":
        _vision_call(model, x, output_hidden_states=True)
    fast = lraee.accelerate(model)
    for _ in range(2):
        states = _vision_call(fast, x, output_hidden_states=True).hidden_states
        assert len(states) == len(expected) == 4
        for mine, theirs in zip(states, expected, strict=True):
            assert 0 <= (mine - theirs).norm() / theirs.norm() < 0.06
        assert not torch.equal(states[-2], expected[-2])
    y = encode_image(fast, x)
    assert_same(encode_image(copy.deepcopy(fast), x), y)
    back = lraee.restore(fast)
    again = _vision_call(back, x, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert_same(encode_image(lraee.accelerate(back), x), y)


@every
def test_hidden_states_through_the_fused_block(name: str) -> None:
    """The states that are recorded are those of the same call without recording."""
    fast, x = accelerated(name), pictures(2)
    plain = _vision_call(fast, x)
    recorded = _vision_call(fast, x, output_hidden_states=True)
    assert_same(recorded.last_hidden_state, plain.last_hidden_state)
    assert_same(_vision_call(fast, x).last_hidden_state, plain.last_hidden_state)


@every
def test_attention_weights_are_refused(name: str) -> None:
    fast, x = accelerated(name), pictures(2)
    with pytest.raises(NotImplementedError, match=r"output_attentions must be .*lraee.restore"):
        _vision_call(fast, x, output_attentions=True)


@every
def test_the_order_of_outputs_without_return_dict(name: str) -> None:
    model, x = make(name), pictures(2)
    fast = accelerated(name)
    if not IS_5:
        pytest.skip("version 4 has return_dict in some of its classes only")
    expected = _vision_call(model, x, return_dict=False)
    outputs = _vision_call(fast, x, return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(expected)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert mine.shape == theirs.shape


@every
def test_hooks_see_what_they_saw(name: str) -> None:
    """A hook inside a block runs the library's own forward over int8 children."""
    fast, x = accelerated(name), pictures(2)
    y, recorded = encode_image(fast, x), []
    block = blocks_of(find_tower(fast))[1]
    spec = block.block_spec
    handle = block.get_submodule(spec.norm_2.path).register_forward_hook(
        lambda module, args, output: recorded.append(output)
    )
    hooked = encode_image(fast, x)
    handle.remove()
    assert len(recorded) == 1 and (hooked - y).norm() / y.norm() < 0.02
    assert_same(encode_image(fast, x), y)


@every
def test_a_linear_stays_float(name: str) -> None:
    model, x = make(name), pictures(2)
    spec = tower_spec(find_tower(model))
    kept = f"{spec.block_name(1)}.{block_specs(find_tower(model))[1].mlp.fc2.path}"
    fast = lraee.accelerate(model, scheme=lraee.Scheme(keep_float=(kept,)))
    y, expected = encode_image(fast, x), encode_image(model, x)
    assert 0 < (y - expected).norm() / expected.norm() < 0.06


@pytest.mark.parametrize("name", ["CLIPModel", "ViTModel", "BlipVisionModel", "SiglipVisionModel"])
def test_positions_are_interpolated(name: str) -> None:
    model = make(name)
    fast = accelerated(name)
    x = torch.randn(2, 3, 48, 40)
    expected = _vision_call(model, x, interpolate_pos_encoding=True).last_hidden_state
    y = _vision_call(fast, x, interpolate_pos_encoding=True).last_hidden_state
    assert (y - expected).norm() / expected.norm() < 0.03
    with pytest.raises(ValueError, match=r"pixel_values must be \[B, C, 32, 32\], got .*48, 40\]"):
        _vision_call(fast, x)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "Dinov2Model", "SiglipModel"])
def test_wrong_arguments_are_one_line(name: str) -> None:
    fast, x = accelerated(name), pictures(2)
    for bad in (
        {"pixel_values": x, "some_thing": x},
        {"pixel_values": None},
        {"pixel_values": x[0]},
    ):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            _named_call(fast, bad)
        assert "\n" not in str(error.value)


def _named_call(model: nn.Module, arguments: dict[str, Any]) -> Any:
    vision = model.vision_model if hasattr(model, "get_text_features") else model
    return vision(**arguments)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_are_irrelevant(implementation: str) -> None:
    model, x = make("CLIPModel"), pictures(2)
    y = encode_image(lraee.accelerate(model), x)
    model.set_attn_implementation(implementation)
    assert_same(encode_image(lraee.accelerate(model), x), y)


def test_a_user_s_subclass_is_what_its_base_is() -> None:
    class Mine(transformers.CLIPVisionModel):
        pass

    model = Mine(transformers.CLIPVisionConfig(**{**make("CLIPVisionModel").config.to_dict()}))
    model.load_state_dict(make("CLIPVisionModel").state_dict())
    fast, x = lraee.accelerate(model.eval()), pictures(2)
    assert isinstance(fast, Mine)
    assert_same(encode_image(fast, x), encode_image(lraee.accelerate(make("CLIPVisionModel")), x))


def test_a_class_that_is_not_known_is_one_line() -> None:
    config = transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[1])
    with pytest.raises(
        NotImplementedError, match="SwinModel: of transformers' classes INT8 knows"
    ) as e:
        lraee.accelerate(transformers.SwinModel(config).eval())
    assert (
        "CLIPModel" in str(e.value) and "Dinov2Model" in str(e.value) and "\n" not in str(e.value)
    )


def test_the_whole_dual_model() -> None:
    model, x = make("CLIPModel"), pictures()
    fast = lraee.accelerate(model)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    expected, output = model(input_ids=ids, pixel_values=x), fast(input_ids=ids, pixel_values=x)
    assert_same(output.text_embeds, expected.text_embeds)
    assert (output.image_embeds - expected.image_embeds).norm() < 0.1
    assert output.logits_per_image.shape == (5, 2)
    assert_same(model.get_text_features(ids)[0], fast.get_text_features(ids)[0])


def test_lraee_needs_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import lraee"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
