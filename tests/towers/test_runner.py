"""The tower around its blocks: exits go in and out of it without a trace, or are refused."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lraee
from lraee.exits.bundle import Exits
from lraee.exits.gate import Gate
from lraee.exits.plan import Plan
from lraee.model.acceleration import acceleration_of
from lraee.towers import runner as vision
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, find_tower
from lraee.towers.flops import PartFlops
from lraee.towers.state import tower_hash
from tests.clip_models import VARIANTS, make_images, make_model, make_texts
from tests.exits.random_exits import make_exits, make_head
from tests.support import TEXT_BOUND, assert_same, assert_within


@pytest.fixture
def model() -> nn.Module:
    return make_model()


def assert_float_again(restored: nn.Module, original: nn.Module) -> None:
    """Bit for bit, and nothing of the exits is left on it."""
    assert [n for n, _ in restored.named_modules()] == [n for n, _ in original.named_modules()]
    states = restored.state_dict(), original.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        assert_same(states[0][name], tensor, name=name)
    for module in (restored, restored.visual):
        assert not hasattr(module, "set_classes")
    assert not hasattr(restored.visual, "exits") and acceleration_of(restored) is None
    assert type(restored.visual) is type(original.visual)
    images, texts = make_images(4), make_texts()
    with torch.no_grad():
        assert_same(restored.encode_image(images), original.encode_image(images))
        assert_same(restored.encode_text(texts), original.encode_text(texts))
    restored.train()


@pytest.mark.parametrize("variant", ["plain", "custom_text", "pool_avg", "final_ln_after_pool"])
def test_restore_of_a_model_with_exits(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    exits = make_exits(model, kind="learned")
    fast = lraee.accelerate(model, exits=exits)
    fast.set_classes(torch.eye(3, 24))
    with torch.no_grad():
        expected = fast.encode_image(make_images(3))
        assert_float_again(lraee.restore(fast), model)
        assert_float_again(lraee.restore(copy.deepcopy(fast)), model)
        assert fast.encode_image(make_images(3)).shape == expected.shape
    again = lraee.accelerate(lraee.restore(fast), exits=exits)
    images = make_images(9)
    with torch.no_grad(), lraee.trace(again) as t:
        assert_same(
            again.encode_image(images), lraee.accelerate(model, exits=exits).encode_image(images)
        )
    assert t.stats.images == 9


def test_a_tower_alone(model: nn.Module) -> None:
    tower, exits = model.visual, make_exits(model, kind="confidence")
    fast = lraee.accelerate(tower, exits=exits)
    images = make_images(9)
    with torch.no_grad():
        expected = lraee.accelerate(model, exits=exits).encode_image(images)
        assert_same(fast(images), expected)
        restored = lraee.restore(fast)
        assert_same(restored(images), tower(images))
    assert not hasattr(restored, "set_classes") and not hasattr(restored, "exits")


@torch.no_grad()
def test_in_place(model: nn.Module) -> None:
    exits = make_exits(model, kind="confidence")
    base, images = copy.deepcopy(model), make_images(9)
    expected = lraee.accelerate(model, exits=exits).encode_image(images)
    fast = lraee.accelerate(model, exits=exits, inplace=True)
    assert fast is model
    assert_same(fast.encode_image(images), expected)
    with lraee.full_depth(fast):
        assert_same(fast.encode_image(images), lraee.accelerate(base).encode_image(images))
    assert_float_again(lraee.restore(fast, base), base)


@torch.no_grad()
def test_check_is_at_full_depth(model: nn.Module) -> None:
    """Heads that are far from the float model would fail it."""
    exits = make_exits(model, kind="static")
    images = make_images(8)
    for inplace in (False, True):
        each = copy.deepcopy(model)
        fast = lraee.accelerate(each, exits=exits, check=images, inplace=inplace)
        early = F.cosine_similarity(fast.encode_image(images), model.encode_image(images))
        assert early.mean() < 0.9, "the check would have failed on these"
        with lraee.full_depth(fast):
            assert_same(fast.encode_image(images), lraee.accelerate(model).encode_image(images))


@torch.no_grad()
def test_exits_are_in_the_state_and_move_with_the_model(model: nn.Module) -> None:
    exits = make_exits(model, kind="learned")
    fast = lraee.accelerate(model, exits=exits)
    names = {name for name in fast.state_dict() if name.startswith("visual.exits.")}
    assert {"visual.exits.classes", "visual.exits.heads.0.gamma"} <= names
    other = lraee.accelerate(model, exits=replace(exits, classes=torch.eye(7, 24)))
    images = make_images(9)
    assert not torch.equal(other.encode_image(images), fast.encode_image(images))
    other.load_state_dict(fast.state_dict())
    assert_same(other.encode_image(images), fast.encode_image(images))
    moved = copy.deepcopy(fast).to("meta")
    assert {p.device.type for p in moved.visual.exits.buffers()} == {"meta"}
    half = copy.deepcopy(fast).half()
    assert half.visual.exits.classes.dtype == torch.float32
    assert half.encode_image(images.half()).dtype == torch.float16


@torch.no_grad()
def test_forward_and_intermediates_know_of_exits(model: nn.Module) -> None:
    fast = lraee.accelerate(model, exits=make_exits(model, kind="learned"))
    images, texts = make_images(6), make_texts(2)
    features = fast.encode_image(images, normalize=True)
    assert_same(fast(images, texts)[0], features)
    assert_within(fast.encode_text(texts), model.encode_text(texts), TEXT_BOUND)
    plain = lraee.accelerate(model)
    with lraee.full_depth(fast):
        result = fast.forward_intermediates(images, texts)
    expected = plain.forward_intermediates(images, texts)
    for name in ("image_features", "text_features"):
        assert_same(result[name], expected[name], name=name)


# What does not go together


def wider(exits: Exits, D: int, E: int) -> Exits:
    heads = {
        block: make_head(D, E, hidden=None, has_class_token=False, seed=block)
        for block in exits.heads
    }
    return replace(exits, heads=heads)


def deeper(exits: Exits) -> Exits:
    """An exit after the last block: nothing is left to save there."""
    plan = Plan((3,), Gate("learned", ((0.0,) * 4,), (0.5,)))
    return replace(exits, heads={3: exits.heads[1]}, plans={"learned": plan})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: wider(e, 32, 24), r"heads \[64 or 128\] -> \[24\], got \[32\] -> \[24\] after"),
        (lambda e: wider(e, 64, 20), r"heads \[64 or 128\] -> \[24\], got \[64\] -> \[20\] after"),
        (deeper, "exits must stand before the last of 3 blocks, got 3"),
        (lambda e: replace(e, base_hash="0" * 64), "must be made for this tower's weights .*00000"),
        (lambda e: replace(e, scheme=lraee.Scheme(symmetric=("c_fc",))), "made for this scheme"),
        (lambda e: replace(e, classes=None), "must hold class texts for a learned gate, got none"),
    ],
)
def test_exits_of_another_tower(model: nn.Module, change: Any, message: str) -> None:
    exits = change(make_exits(model, kind="learned"))
    with pytest.raises(ValueError, match=f"^accelerate: .*{message}"):
        lraee.accelerate(model, exits=exits)


def test_a_model_in_place_is_as_it_was_where_exits_are_refused(model: nn.Module) -> None:
    base, exits = copy.deepcopy(model), make_exits(model, kind="learned")
    for wrong in (
        replace(exits, base_hash="0" * 64),
        replace(exits, scheme=lraee.Scheme(clip_weights=True)),
    ):
        with pytest.raises(ValueError, match="^accelerate: exits must be made for this"):
            lraee.accelerate(model, exits=wrong, inplace=True)
    assert_float_again(model, base)


@pytest.mark.parametrize("variant", ["pool_none", "parallel_pool"])
def test_towers_that_give_more_than_one_vector(variant: str) -> None:
    tower = find_tower(lraee.accelerate(make_model(**VARIANTS[variant])))
    with pytest.raises(
        NotImplementedError, match="^exits: the tower must be open_clip's own VisionTransformer"
    ):
        embedding_size(tower)


@torch.no_grad()
def test_a_tower_with_a_pooler() -> None:
    model = make_model(**VARIANTS["attentional_pool"])
    fast = lraee.accelerate(model, exits=make_exits(model, kind="agreement"))
    images = make_images(12)
    with lraee.trace(fast) as t:
        y = fast.encode_image(images)
    plain = lraee.accelerate(model).encode_image(images)
    stayed = t.exit_block == 3
    assert 0 < int(stayed.sum()) < 12
    assert_same(y[stayed], plain[stayed])


def test_output_tokens_are_refused_at_once() -> None:
    model = make_model(vision={"output_tokens": True})
    exits = make_exits(make_model(), kind="learned")
    exits = replace(exits, base_hash=tower_hash(model.visual.state_dict()))
    with pytest.raises(NotImplementedError, match="^exits: output_tokens must be False, got True"):
        lraee.accelerate(model, exits=exits)


def test_detaching_twice_is_once(model: nn.Module) -> None:
    fast = lraee.accelerate(model, exits=make_exits(model, kind="learned"))
    assert vision.exits_of(fast.visual) is not None
    for _ in range(2):
        vision.detach_exits(fast.visual)
        assert vision.exits_of(fast.visual) is None
    images: Tensor = make_images(5)
    with torch.no_grad():
        assert_same(fast.encode_image(images), lraee.accelerate(model).encode_image(images))


# The class token alone in the last block

ALONE = [
    "plain", "custom_text", "quick_gelu", "raw_in_proj", "layer_scale", "raw_layer_scale",
    "no_ln_pre", "patch_dropout", "norm_eps", "mlp_ratio",
]  # fmt: skip
WHOLE = [
    "pool_avg", "pool_none", "final_ln_after_pool", "attentional_pool", "parallel_pool"
]  # fmt: skip


def runs_first_alone(tower: nn.Module, images: Tensor) -> bool:
    """Whether a call leaves work of the last block out, by torch's own count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(images)
    whole = len(images) * PartFlops.of(tower).total
    assert counter.get_total_flops() in (len(images) * PartFlops.as_run(tower).total, whole)
    return int(counter.get_total_flops()) < whole


@pytest.mark.parametrize("is_batch_first", [True, False])
@pytest.mark.parametrize("variant", ALONE)
def test_last_block_computes_the_class_token_alone_with_the_same_bits(
    variant: str, is_batch_first: bool
) -> None:
    model = make_model(**VARIANTS[variant])
    if not is_batch_first:
        make_sequence_first(model.visual)
    fast, images = lraee.accelerate(model).visual, make_images(5)
    assert runs_first_alone(fast, images)
    with torch.no_grad():
        result = fast(images)
        recorded: list[torch.Size] = []
        last = blocks_of(fast)[-1]
        hook = last.register_forward_hook(lambda module, given, y: recorded.append(y.shape))
        assert not runs_first_alone(fast, images)
        assert_same(result, fast(images))
        hook.remove()
    assert sorted(recorded[0][:2]) == [5, 17]
    assert runs_first_alone(fast, images)


def make_sequence_first(tower: nn.Module) -> None:
    """As open_clip builds a tower with batch_first=False."""
    tower.transformer.batch_first = False
    for block in blocks_of(tower):
        block.attn.batch_first = False


@pytest.mark.parametrize("variant", WHOLE)
def test_towers_that_need_all_tokens_run_the_last_block_whole(variant: str) -> None:
    tower = lraee.accelerate(make_model(**VARIANTS[variant])).visual
    assert not vision.ends_with_class_token(tower)
    assert PartFlops.as_run(tower) == PartFlops.of(tower)


def test_whoever_asks_for_tokens_gets_them() -> None:
    model = make_model()
    fast, images = lraee.accelerate(model).visual, make_images(3)
    with torch.no_grad():
        expected = fast(images)
        for part in (fast.transformer, fast.ln_post):
            seen: list[Tensor] = []
            hook = part.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y))
            assert not vision.ends_with_class_token(fast)
            assert_same(fast(images), expected)
            assert seen[0].shape == (3, 17, 64)
            hook.remove()
        fast.output_tokens = True
        pooled, tokens = fast(images)
    assert_same(pooled, expected)
    assert tokens.shape == (3, 16, 64)


@pytest.mark.parametrize("scheme", ["paper", lraee.Scheme(attention="float")])
def test_blocks_that_run_child_by_child_stay_whole(scheme: str | lraee.Scheme) -> None:
    """A step for the whole batch sees all tokens."""
    tower = lraee.accelerate(make_model(), scheme=scheme).visual
    assert not vision.ends_with_class_token(tower)
    assert not runs_first_alone(tower, make_images(2))


def test_exits_end_with_the_class_token_alone(model: nn.Module) -> None:
    exits = make_exits(model, kind="learned")
    fast, images = lraee.accelerate(model, exits=exits), make_images(24)
    with torch.no_grad(), lraee.trace(fast) as alone:
        result = fast.encode_image(images)
    blocks_of(fast.visual)[-1].register_forward_hook(lambda *_: None)
    with torch.no_grad(), lraee.trace(fast) as whole:
        assert_same(result, fast.encode_image(images))
    assert 0 < len(set(alone.exit_block.tolist())) <= 3 and 3 in alone.exit_block
    assert_same(alone.exit_block, whole.exit_block)
    assert alone.stats.full_flops < whole.stats.full_flops


# Large batches in parts


@pytest.mark.parametrize(("by_thread", "sizes"), [(1, [2] * 9 + [1]), (3, [6, 6, 6, 1])])
@pytest.mark.parametrize("has_exits", [False, True])
def test_parts_of_a_large_batch_give_the_same_bits(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    has_exits: bool,
    by_thread: int,
    sizes: list[int],
) -> None:
    exits = make_exits(model, kind="learned") if has_exits else None
    fast, images = lraee.accelerate(model, exits=exits), make_images(19)
    images[5, 0, 3, 3] = torch.nan
    with torch.no_grad():
        expected = fast.encode_image(images)
        whole = trace_of(fast, images) if has_exits else []
        monkeypatch.setattr(vision, "_BYTES_PER_THREAD", by_thread * 17 * 64 * 4)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert [len(part) for part in vision._parts(fast.visual, images)] == sizes
        assert_same(fast.encode_image(images), expected)
        assert (trace_of(fast, images) if has_exits else []) == whole
    assert expected.isnan().all(1).nonzero()[:, 0].tolist() == [5]


def trace_of(fast: nn.Module, images: Tensor) -> list[int]:
    with lraee.trace(fast) as t:
        fast.encode_image(images)
    return list(t.exit_block.tolist())


def test_who_looks_on_sees_one_call(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = make_images(6)
    fast = lraee.accelerate(model).visual
    assert [len(part) for part in vision._parts(fast, images)] == [2] * 3
    for part in (fast.conv1, fast.ln_pre, blocks_of(fast)[1].mlp.c_fc):
        seen: list[int] = []
        hook = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            fast(images)
        assert len(seen) == 1
        hook.remove()
    paper = lraee.accelerate(model, scheme="paper").visual
    assert len(vision._parts(paper, images)) == 1, "a step is the batch's"
    assert vision._parts(fast, images[:0])[0].shape[0] == 0
