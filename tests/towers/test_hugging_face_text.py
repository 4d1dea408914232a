"""transformers' text models in int8: the promises of the image tower, and key masks."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lraee
from lraee.layers.int8_block import Int8Block
from lraee.model.acceleration import acceleration_of
from lraee.towers import families, text_encoder
from lraee.towers.wrappers import unwrapped
from tests.support import TEXT_BOUND, assert_same, assert_within
from tests.towers.text_models import (
    ALONE,
    BROKEN,
    CAUSAL,
    END,
    IS_5,
    LENGTHS,
    MODELS,
    L,
    accelerated,
    features,
    make,
    make_ids,
    mask_of,
    text_model,
    tower_of,
    transformers,
)

KNOWN = [name for name in MODELS if name not in BROKEN]
every = pytest.mark.parametrize("name", KNOWN)
alone = pytest.mark.parametrize("name", ALONE)
VALID = mask_of().bool()


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def encode_text(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Unit rows, as this package encodes texts."""
    if hasattr(unwrapped(model), "get_text_features"):
        return families.encode_text(model, ids)
    rows = text_encoder.encode(model, ids)
    assert rows is not None
    return nn.functional.normalize(rows, dim=-1)


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@every
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_numbers_are_close_and_have_the_same_bits_in_any_batch(name: str, masked: bool) -> None:
    model, fast, ids = make(name), accelerated(name), make_ids()
    before = copy.deepcopy(model.state_dict())
    assert isinstance(fast, type(model))
    given = {"attention_mask": mask_of()} if masked else {}
    y, expected = features(fast, ids, **given), features(model, ids, **given)
    assert 0 < relative(y, expected) < 0.05
    tokens = text_model(fast)(ids, **given).last_hidden_state
    floats = text_model(model)(ids, **given).last_hidden_state
    assert tokens.shape == floats.shape
    assert 0 < relative(tokens, floats) < 0.05  # padding rows too
    for i in range(len(ids)):
        one = {k: v[i : i + 1] for k, v in given.items()}
        assert_same(features(fast, ids[i : i + 1], **one)[0], y[i])
    order = torch.tensor([3, 4, 0, 1, 2, 3])
    assert_same(features(fast, ids[order], **{k: v[order] for k, v in given.items()}), y[order])
    for key, tensor in model.state_dict().items():
        assert_same(tensor, before[key])


@every
def test_more_padding_changes_nothing(name: str) -> None:
    fast, lengths = accelerated(name), [5, 9, 3]
    narrow, wide = make_ids(lengths, width=9), make_ids(lengths, width=L)
    wide[:, 9:] = 7  # masked, so whatever it is
    masks = mask_of(lengths, 9), mask_of(lengths, L)
    tokens, rest = (
        text_model(fast)(ids, attention_mask=mask).last_hidden_state
        for ids, mask in zip((narrow, wide), masks, strict=True)
    )
    assert_same(rest[:, :9], tokens)
    if not name.startswith("Siglip"):  # which pools the last token, padding or not
        pooled = [
            features(fast, i, attention_mask=m) for i, m in zip((narrow, wide), masks, strict=True)
        ]
        assert_same(pooled[1], pooled[0])


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "ChineseCLIPTextModel"])
def test_padding_may_stand_first(name: str) -> None:
    model, fast = make(name), accelerated(name)
    ids, mask = make_ids([L, L]), torch.ones(2, L, dtype=torch.int64)
    mask[0, :4] = 0
    tokens, expected = (
        text_model(m)(ids, attention_mask=mask).last_hidden_state for m in (fast, model)
    )
    assert relative(tokens[mask.bool()], expected[mask.bool()]) < 0.05
    other = ids.clone()
    other[0, :4] = 9
    changed = text_model(fast)(other, attention_mask=mask).last_hidden_state
    assert_same(changed[mask.bool()], tokens[mask.bool()])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_attention_implementations_are_irrelevant(name: str, implementation: str) -> None:
    ids, mask = make_ids(), mask_of()
    model = make(name)
    model.set_attn_implementation(implementation)
    fast = lraee.accelerate(model, text="int8")
    rows = text_model(fast)(ids, attention_mask=mask).last_hidden_state
    own = text_model(accelerated(name))(ids, attention_mask=mask).last_hidden_state
    assert_same(rows[VALID], own[VALID])


@every
def test_blocks_are_instances_of_the_library_s_classes(name: str) -> None:
    model, fast = make(name), accelerated(name)
    for mine, theirs in zip(tower_of(fast).blocks, tower_of(model).blocks, strict=True):
        assert isinstance(mine, Int8Block) and isinstance(mine, type(theirs)) and mine.can_fuse
        assert mine.block_spec.attention.is_causal == (name in CAUSAL)


@every
def test_restored_copied_and_pickled(name: str) -> None:
    model, ids = make(name), make_ids()
    fast = lraee.accelerate(model, text="int8")
    y = features(fast, ids)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(features(other, ids), y)
        assert other.state_dict().keys() == fast.state_dict().keys()
        assert_same(encode_text(other, ids), encode_text(fast, ids))
    for back in (lraee.restore(fast), lraee.restore(fast, model.state_dict())):
        assert type(back) is type(model)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        for key, tensor in model.state_dict().items():
            assert_same(back.state_dict()[key], tensor, name=key)
        assert_same(features(back, ids), features(model, ids))
        assert acceleration_of(back) is None and "text_encoder" not in vars(tower_of(back).owner)
        back.train()


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = make(name), make_ids()
    kept = f"{tower_of(model).spec.block_name(1)}.{tower_of(model).block_specs()[1].mlp.fc1.path}"
    for scheme in ("int8", "int8-patches", lraee.Scheme(keep_float=(kept,))):
        fast = lraee.accelerate(model, scheme=scheme, text="int8")
        lraee.save(fast, tmp_path)
        loaded = lraee.load(tmp_path, model)
        assert_same(features(loaded, ids), features(fast, ids))
    another = make(name)
    tower_of(another).blocks[0].get_parameter(
        tower_of(another).block_specs()[0].mlp.fc2.parts[0].weight
    )[0, 0] += 1.0
    with pytest.raises(lraee.CheckpointError, match="base_sha256 must be that of the"):
        lraee.load(tmp_path, another)


@every
def test_hidden_states_and_attention_weights(name: str) -> None:
    model, ids = make(name), make_ids()
    holder = (lambda m: m) if name in ALONE else text_model
    expected = holder(model)(ids, output_hidden_states=True).hidden_states
    if expected is None:
        pytest.skip(f"transformers {transformers.__version__} records none of its inner model")
    fast = lraee.accelerate(model, text="int8")  # hooks of the library stand on the float one
    for _ in range(2):
        states = holder(fast)(ids, output_hidden_states=True).hidden_states
        assert len(states) == len(expected) == 3
        for mine, theirs in zip(states, expected, strict=True):
            assert relative(mine, theirs) < 0.05
        assert not torch.equal(states[-2], expected[-2])
    with pytest.raises(NotImplementedError, match="output_attentions must be False, got True") as e:
        holder(fast)(ids, output_attentions=True)
    assert "\n" not in str(e.value)


@every
def test_hooks_see_what_they_saw(name: str) -> None:
    """A hook inside a block runs the library's own forward over int8 children."""
    fast, ids = accelerated(name), make_ids()
    given, shapes = {"attention_mask": mask_of()}, []
    y = features(fast, ids, **given)
    block = tower_of(fast).blocks[1]
    handle = block.get_submodule(block.block_spec.norm_2.path).register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    hooked = features(fast, ids, **given)
    handle.remove()
    assert shapes == [(len(ids), L, 64)] and relative(hooked, y) < 0.02
    assert_same(features(fast, ids, **given), y)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_text(name: str, bad: float) -> None:
    fast, ids = lraee.accelerate(make(name), text="int8"), make_ids()
    ids[ids == 50] = 51
    ids[1, 2] = 50
    given = {"attention_mask": mask_of()}
    y = features(fast, ids, **given)
    embeddings = next(m for m in tower_of(fast).owner.modules() if isinstance(m, nn.Embedding))
    embeddings.weight[50, 3] = bad
    z = features(fast, ids, **given)
    others = [0, 2, 3, 4]
    assert_same(z[others], y[others])
    assert z[1].isnan().any()


@every
def test_gradients_and_train_are_refused(name: str) -> None:
    fast, ids = lraee.accelerate(make(name), text="int8"), make_ids()
    with torch.enable_grad():
        output = text_model(fast)(ids).last_hidden_state
        with pytest.raises(RuntimeError, match="backward: an accelerated tower has int8 weights"):
            output.square().sum().backward()
    for module in (fast, *tower_of(fast).guarded):
        with pytest.raises(RuntimeError, match="train: an accelerated tower has int8 weights"):
            module.train()
    assert not any(module.training for module in fast.modules())


# What this package itself encodes


@every
def test_encode_text_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit rows: float within the bound of a cut, int8 with the bits of the text alone."""
    model, ids = make(name), make_ids(end=END if "MetaClip2" not in name else 2)
    expected = encode_text(model, ids)
    assert_within(expected.norm(dim=1), torch.ones(len(ids)), 1e-5)
    tower, shapes = tower_of(model), []
    is_cut = tower.spec.is_cut
    assert is_cut == (not name.startswith("Siglip"))
    if name not in ALONE:
        fast = lraee.accelerate(model)
        assert_within(encode_text(fast, ids[:4, :12]), encode_text(model, ids[:4, :12]), TEXT_BOUND)
    fast = lraee.accelerate(model, text="int8")
    embedding = next(m for m in tower_of(fast).owner.modules() if isinstance(m, nn.Embedding))
    monkeypatch.setattr(
        embedding, "forward",
        lambda x: shapes.append(tuple(x.shape)) or nn.Embedding.forward(embedding, x),
    )  # fmt: skip
    y = encode_text(fast, ids)
    assert nn.functional.cosine_similarity(y, expected).min() > 0.995
    by_eight, exact = [(2, 8), (3, L)], [(1, 3), (1, 5), (2, 9), (1, L)]
    assert shapes == ([(5, L)] if not is_cut else by_eight if name in CAUSAL else exact)
    for i, n in enumerate(LENGTHS):
        assert_same(encode_text(fast, ids[i : i + 1])[0], y[i])
        if is_cut and name not in CAUSAL:
            assert_same(encode_text(fast, ids[i : i + 1, :n])[0], y[i])
    if name in CAUSAL:
        other = torch.where(VALID, ids, 7)
        assert_same(encode_text(fast, other), y)


# What is refused


def test_a_text_model_alone_needs_int8(tmp_path: Path) -> None:
    model = make("CLIPTextModel")
    with pytest.raises(ValueError, match="text must be 'int8' for CLIPTextModel, which has no"):
        lraee.accelerate(model)
    with pytest.raises(ValueError, match="check must be None for a model without images"):
        lraee.accelerate(model, text="int8", check=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="keep_float must name linears such as 'text.layers.0"):
        lraee.accelerate(model, scheme=lraee.Scheme(keep_float=("nothing",)), text="int8")
    with pytest.raises(ValueError, match="save: model must be accelerated, got a float one"):
        lraee.save(model, tmp_path)
    fast = lraee.accelerate(model, text="int8", inplace=True)
    assert fast is model
    with pytest.raises(LookupError, match="base must hold the text tower that accelerate saw"):
        lraee.restore(fast)
    with pytest.raises(ValueError, match="got one that is accelerated already"):
        lraee.accelerate(fast, text="int8")
    back = lraee.restore(fast, make("CLIPTextModel"))
    assert_same(features(back, make_ids()), features(make("CLIPTextModel"), make_ids()))


@pytest.mark.parametrize(
    ("name", "inner"), [("Blip", "BlipTextModel"), ("Aimv2", "Aimv2TextModel")]
)
def test_other_text_models_are_one_line(name: str, inner: str) -> None:
    from tests.towers.hugging_face_models import make as make_dual

    model = make_dual(f"{name}Model")
    with pytest.raises(NotImplementedError, match=f"'int8': its text model is a {name}Text") as e:
        lraee.accelerate(model, text="int8")
    assert "\n" not in str(e.value)


def test_a_mask_of_each_query_is_refused() -> None:
    if not IS_5:
        pytest.skip("version 4 takes masks of two dimensions only")
    fast, ids = accelerated("CLIPModel"), make_ids([L, L])
    mask = torch.ones(2, 1, L, L, dtype=torch.bool)
    mask[:, :, 3, 1] = False
    with pytest.raises(NotImplementedError, match="attention_mask must hide the same keys from"):
        text_model(fast)(ids, attention_mask=mask)


def test_relative_positions_are_refused() -> None:
    model = make("ChineseCLIPTextModel")
    model.encoder.layer[0].attention.self.distance_embedding = nn.Embedding(31, 32)
    with pytest.raises(NotImplementedError, match=r"distance_embedding.*\(relative positions\)"):
        lraee.accelerate(model, text="int8")
    model = make("ChineseCLIPTextModel")
    model.encoder.layer[1].attention.self.is_decoder = True
    with pytest.raises(NotImplementedError, match="encoder.layer.1 has attention of a decoder"):
        lraee.accelerate(model, text="int8")
    model = make("ChineseCLIPTextModel")
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    with pytest.raises(NotImplementedError, match="encoder.layer.1 has ReLU as activation"):
        lraee.accelerate(model, text="int8")


def test_half_models() -> None:
    assert transformers is not None
    for name in ("CLIPModel", "AltCLIPModel", "SiglipTextModel"):
        model, ids = make(name).bfloat16(), make_ids()
        fast = lraee.accelerate(model, text="int8")
        y, expected = features(fast, ids), features(model, ids)
        assert y.dtype == torch.bfloat16 and relative(y.float(), expected.float()) < 0.06
        assert_same(features(fast, ids[2:3])[0], y[2])


def test_compiled() -> None:
    """A compiled model runs whole texts under masks; the bits are those of the cut one."""
    fast, ids = accelerated("CLIPModel"), make_ids()
    model = torch.compile(text_model(fast), backend="eager")
    tokens = model(input_ids=ids, attention_mask=mask_of()).last_hidden_state
    expected = text_model(fast)(input_ids=ids, attention_mask=mask_of()).last_hidden_state
    assert_same(tokens, expected)


def test_a_wrapped_model_stays_wrapped() -> None:
    ids, model = make_ids(), make("CLIPModel")
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        fast = lraee.accelerate(wrapped, text="int8")
        assert type(fast) is type(wrapped)
        assert_same(encode_text(fast, ids), encode_text(accelerated("CLIPModel"), ids))
        assert_same(features(lraee.restore(fast)._modules.popitem()[1], ids), features(model, ids))
