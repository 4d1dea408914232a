"""open_clip's HFTextEncoder (BERT, RoBERTa, XLM-RoBERTa): cut at its padding, and in int8."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

import lraee
from lraee.layers.int8_block import Int8Block
from tests.clip_models import make_images, make_model
from tests.support import TEXT_BOUND, assert_same, assert_within
from tests.towers.text_models import KINDS, hf_encoder, make_ids, tower_of, transformers

LENGTHS, WIDTH, PADDING = (5, 9, 12, 1, 9), 16, 1
POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
TOWERS: dict[str, dict[str, Any]] = {
    **{f"{k}, {pooler}": {"kind": k, "pooler": pooler} for k in KINDS for pooler in POOLERS},
    "linear": {"proj": "linear"},
    "no projection": {"proj": None},
    "no pooling layer": {"kind": "bert", "pooler": "mean_pooler", "config": {"pad_token_id": 0}},
}
each = pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def ids_for(model: nn.Module, width: int = WIDTH) -> Tensor:
    return make_ids(LENGTHS, width=width, padding=model.text.config.pad_token_id)


def watched_lengths(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the ids that the word embedding is called with; no hook, which stops the cut."""
    words, shapes = model.text.transformer.embeddings.word_embeddings, []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return nn.Embedding.forward(words, ids)

    monkeypatch.setattr(words, "forward", forward)
    return shapes


@each
def test_a_float_tower_is_cut_at_its_padding(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_encoder(**options)
    fast, ids = lraee.accelerate(model), ids_for(model)
    shapes = watched_lengths(fast, monkeypatch)
    assert_within(fast.encode_text(ids), model.encode_text(ids), TEXT_BOUND)
    assert shapes == [(5, 12)]
    assert isinstance(fast.text, HFTextEncoder)


@each
def test_a_text_has_the_same_bits_in_any_batch_and_with_any_padding(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_encoder(**options)
    fast, ids = lraee.accelerate(model, text="int8"), ids_for(model)
    shapes = watched_lengths(fast, monkeypatch)
    y, expected = fast.encode_text(ids), model.encode_text(ids)
    assert shapes == [(1, 1), (1, 5), (2, 9), (1, 12)]
    assert 0 < (y - expected).norm() / expected.norm() < 0.05
    for i, n in enumerate(LENGTHS):
        assert_same(fast.encode_text(ids[i : i + 1, :n])[0], y[i])
    assert_same(fast.encode_text(ids_for(model, WIDTH + 9)), y)
    order = torch.tensor([3, 2, 2, 0, 4, 1, 3])
    assert_same(fast.encode_text(ids[order]), y[order])
    assert all(isinstance(b, Int8Block) and b.can_fuse for b in tower_of(fast).blocks)


@each
def test_a_hook_is_given_whole_texts(options: dict[str, Any]) -> None:
    """A masked key has no weight, so a valid token has the bits that it has without padding."""
    model = hf_encoder(**options)
    fast, ids, shapes = lraee.accelerate(model, text="int8"), ids_for(model), []
    y = fast.encode_text(ids)
    handle = fast.text.pooler.register_forward_hook(
        lambda m, given, out: shapes.append(given[0].last_hidden_state.shape)
    )
    assert_same(fast.encode_text(ids), y)
    handle.remove()
    assert shapes == [(5, WIDTH, 64)]
    block = tower_of(fast).blocks[0]
    handle = block.intermediate.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    hooked = fast.encode_text(ids)
    handle.remove()
    assert shapes[1:] == [(5, WIDTH, 128)]
    assert (hooked - y).norm() / y.norm() < 0.02


@each
def test_restored_copied_pickled_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model = hf_encoder(**options)
    before = copy.deepcopy(model.state_dict())
    fast, ids = lraee.accelerate(model, text="int8"), ids_for(model)
    y, expected = fast.encode_text(ids), model.encode_text(ids)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert_same(other.encode_text(ids), y)
    for back in (lraee.restore(fast), lraee.restore(fast, before)):
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        for name, value in before.items():
            assert_same(back.state_dict()[name], value, name=name)
            assert_same(model.state_dict()[name], value, name=name)
        assert_same(back.encode_text(ids), expected)
        back.train()
    images = make_images(2)
    assert_same(fast.encode_image(images), lraee.accelerate(model).encode_image(images))
    with pytest.raises(RuntimeError, match="train: an accelerated tower has int8 weights"):
        fast.text.transformer.train()


def test_nan_stays_in_its_text() -> None:
    fast, ids = lraee.accelerate(hf_encoder(), text="int8"), make_ids(LENGTHS, padding=PADDING)
    ids[ids == 50] = 51
    ids[1, 2] = 50
    y = fast.encode_text(ids)
    fast.text.transformer.embeddings.word_embeddings.weight[50, 3] = torch.nan
    z = fast.encode_text(ids)
    assert_same(z[[0, 2, 3, 4]], y[[0, 2, 3, 4]])
    assert z[1].isnan().all()


@pytest.mark.parametrize("text", [None, "int8"])
def test_padding_before_other_tokens_is_masked(text: str | None) -> None:
    model = hf_encoder("bert", "mean_pooler")
    fast, ids = lraee.accelerate(model, text=text), make_ids((9, 12), padding=PADDING)
    ids[0, 3] = PADDING
    y, expected = fast.encode_text(ids), model.encode_text(ids)
    assert (y - expected).norm() / expected.norm() < (1e-5 if text is None else 0.05)
    assert_same(fast.encode_text(ids[1:])[0] if text else y[1], y[1])


def test_tokens_are_given_whole() -> None:
    """As CoCa takes them."""
    model = hf_encoder("roberta", "cls_pooler", "linear", output_tokens=True)
    fast, ids = lraee.accelerate(model, text="int8"), ids_for(model)
    (pooled, tokens), (floats, whole) = fast.text(ids), model.text(ids)
    assert tokens.shape == whole.shape
    assert (pooled - floats).norm() / floats.norm() < 0.05
    assert (tokens - whole).norm() / whole.norm() < 0.05


def test_gradients_are_refused() -> None:
    model = hf_encoder()
    with torch.enable_grad():
        loss = lraee.accelerate(model, text="int8").encode_text(ids_for(model)).square().sum()
        with pytest.raises(RuntimeError, match="backward: an accelerated tower has int8 weights"):
            loss.backward()


def test_the_max_pooler_fails_as_it_did() -> None:
    """open_clip gives masked_fill an integer mask, which torch refuses."""
    model = hf_encoder(pooler="max_pooler")
    for each_model in (model, lraee.accelerate(model, text="int8")):
        with pytest.raises(RuntimeError, match="only supports boolean masks"):
            each_model.encode_text(ids_for(model))


def test_a_linear_stays_float() -> None:
    model = hf_encoder()
    kept = ("text.layer.0.output.dense", "text.layer.1.attention.self.in_proj")
    fast = lraee.accelerate(model, scheme=lraee.Scheme(keep_float=kept), text="int8")
    ids = ids_for(model)
    y, expected = fast.encode_text(ids), model.encode_text(ids)
    assert 0 < (y - expected).norm() / expected.norm() < 0.05
    assert isinstance(tower_of(fast).blocks[0].output.dense, nn.Linear)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MT5Config(
                d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=100
            ),
            "a mt5 text tower, which adds a position bias to the scores of attention",
        ),
        (
            transformers.M2M100Config(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
                decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
                vocab_size=100,
            ),
            "a m2m_100 text tower, and INT8 knows bert, roberta, xlm-roberta",
        ),
    ],
    ids=["mt5", "m2m_100"],
)  # fmt: skip
def test_other_towers_are_refused(config: Any, reason: str) -> None:
    model = make_model(custom_text=True)
    model.text = HFTextEncoder("", 24, config=config, pooler_type="mean_pooler", proj_type="mlp")
    model.eval()
    with pytest.raises(NotImplementedError, match=f"got 'int8': it has {reason}") as e:
        lraee.accelerate(model, text="int8")
    assert "\n" not in str(e.value)
    lraee.accelerate(model)
