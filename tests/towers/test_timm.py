"""timm's towers, alone and in open_clip's TimmModel: same class, same promises."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lraee
from lraee.towers.families import block_specs, find_tower, tower_spec
from lraee.towers.flops import tower_flops
from tests.support import assert_same
from tests.towers.timm_models import FAMILIES, SIZE, as_timm_model, eva, images, make_trunk, vit

ERROR = {"vitamin": 0.05, "eva02": 0.05, "aimv2": 0.05, "dinov2 giant": 0.05}
"""Most that the embedding may be off, relative; a gated MLP's rows have the widest range."""

each_family = pytest.mark.parametrize("family", FAMILIES)


def error_of(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


@each_family
def test_it_is_of_its_class_and_near(family: str) -> None:
    trunk, x = make_trunk(family), images()
    before = copy.deepcopy(trunk.state_dict())
    fast = lraee.accelerate(trunk)
    assert isinstance(fast, type(trunk))
    blocks = zip(fast.blocks, trunk.blocks, strict=True)
    assert all(isinstance(new, type(old)) for new, old in blocks)
    assert error_of(fast(x), trunk(x)) < ERROR.get(family, 0.035)
    assert all(torch.equal(p, before[name]) for name, p in trunk.state_dict().items())
    assert type(trunk.blocks[0]).__module__.startswith("timm.")


@each_family
def test_same_bits_in_any_batch_and_nan_stays_where_it_is(family: str) -> None:
    fast, x = lraee.accelerate(make_trunk(family)), images(5)
    y = fast(x)
    for rows in ([0], [4], [1, 2], [3, 0, 4]):
        assert_same(fast(x[rows]), y[rows], rows=rows)
    bad = x.clone()
    bad[2, 1, 3, 3] = float("nan")
    spoiled = fast(bad)
    assert spoiled[2].isnan().all()
    kept = [0, 1, 3, 4]
    assert_same(spoiled[kept], y[kept])
    if family != "dinov3":  # timm's own positions of any size take no empty batch
        assert fast(x[:0]).shape == (0, y.shape[1])


@pytest.mark.parametrize("family", ["siglip", "vitamin", "pe_core", "eva02", "mean pool"])
def test_same_bits_with_any_number_of_threads(family: str) -> None:
    fast, x, threads = lraee.accelerate(make_trunk(family)), images(7), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fast(x))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@each_family
def test_restore_copies_and_pickles(family: str, tmp_path: Any) -> None:
    trunk, x = make_trunk(family), images(3)
    fast = lraee.accelerate(trunk)
    y = fast(x)
    assert_same(copy.deepcopy(fast)(x), y)
    assert_same(pickle.loads(pickle.dumps(fast))(x), y)
    lraee.save(fast, tmp_path)
    assert_same(lraee.load(tmp_path, trunk)(x), y)
    state = fast.state_dict()
    other = lraee.accelerate(make_trunk(family, seed=3))
    assert not torch.equal(other(x), y)
    other.load_state_dict(state)
    assert_same(other(x), y)
    back = lraee.restore(fast)
    assert type(back) is type(trunk) and type(back.blocks[0]) is type(trunk.blocks[0])
    assert {type(m) for m in back.modules()} == {type(m) for m in trunk.modules()}
    assert_same(back(x), trunk(x))
    for name, tensor in trunk.state_dict().items():
        assert_same(back.state_dict()[name], tensor, name=name)


@each_family
def test_hooks_see_what_they_saw(family: str) -> None:
    trunk, x = make_trunk(family), images(2)
    recorded: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, y: recorded.setdefault(name, []).append(y)

    for name in ("blocks.1", "blocks.2.norm2", "blocks.2.mlp.act", "norm", "blocks.3"):
        trunk.get_submodule(name).register_forward_hook(keep(name))
    trunk(x)
    fast = lraee.accelerate(trunk)
    fast(x)
    for name, (expected, actual) in recorded.items():
        assert actual.shape == expected.shape, name
        assert error_of(actual, expected) < 0.12, name
    assert len(recorded) == 5


@each_family
def test_features_and_intermediates_are_timms(family: str) -> None:
    trunk, x = make_trunk(family), images(3)
    fast = lraee.accelerate(trunk)
    assert_same(fast.forward_head(fast.forward_features(x)), fast(x))
    final, some = fast.forward_intermediates(x, indices=[1, 3])
    expected_final, expected = trunk.forward_intermediates(x, indices=[1, 3])
    assert error_of(final, expected_final) < 0.12
    for a, b in zip(some, expected, strict=True):
        assert a.shape == b.shape and error_of(a, b) < 0.12
    if isinstance(trunk, VisionTransformer):
        (last,) = fast.get_intermediate_layers(x, n=1)
        assert_same(last, fast.forward_intermediates(x, 1, output_fmt="NLC")[1][0])


@each_family
def test_in_open_clips_wrapper(family: str) -> None:
    trunk, x = make_trunk(family), images(3)
    has_projection = isinstance(trunk.head, nn.Identity)
    model = as_timm_model(trunk, has_projection=has_projection)
    fast = lraee.accelerate(model)
    assert isinstance(fast, type(model)) and isinstance(fast.trunk, type(trunk))
    y = fast(x)
    assert y.shape == (3, 24) or not has_projection
    assert error_of(y, model(x)) < ERROR.get(family, 0.035)
    assert_same(fast(x[1:2]), y[1:2])
    assert_same(fast.head(fast.trunk(x)), y)
    assert_same(fast.forward_intermediates(x)["image_features"], y)
    calls: list[Tensor] = []
    handle = fast.trunk.register_forward_hook(lambda module, args, z: calls.append(z))
    assert_same(fast(x), y)
    handle.remove()
    assert_same(fast.head(calls[0]), y)
    assert_same(lraee.restore(fast)(x), model(x))


@each_family
def test_flops_are_torchs(family: str) -> None:
    trunk = make_trunk(family)
    with FlopCounterMode(display=False) as counter:
        trunk(torch.zeros(1, 3, SIZE, SIZE))
    assert tower_flops(trunk) == counter.get_total_flops()
    assert tower_flops(lraee.accelerate(trunk)) == tower_flops(trunk)


@pytest.mark.parametrize("family", ["siglip", "clip", "dinov3"])
def test_int8_patches(family: str) -> None:
    trunk, x = make_trunk(family), images(3)
    fast = lraee.accelerate(trunk, scheme="int8-patches")
    y = fast(x)
    assert error_of(y, trunk(x)) < 0.05
    assert_same(fast(x[2:]), y[2:])
    assert_same(lraee.restore(fast)(x), trunk(x))


def test_int8_patches_need_one_product() -> None:
    with pytest.raises(NotImplementedError, match=r"patch_embedding must be 'float'.*HybridEmbed$"):
        lraee.accelerate(make_trunk("vitamin"), scheme="int8-patches")


@pytest.mark.parametrize("family", ["mean pool", "eva02", "dinov3"])
def test_bfloat16(family: str) -> None:
    trunk, x = make_trunk(family).bfloat16(), images(3).bfloat16()
    fast = lraee.accelerate(trunk)
    y = fast(x)
    assert y.dtype == torch.bfloat16
    assert error_of(y.float(), trunk(x).float()) < 0.08
    assert_same(fast(x[1:2]), y[1:2])


def test_other_sizes_where_the_tower_takes_them() -> None:
    trunk = make_trunk("dinov3")
    x = nn.functional.interpolate(images(2), size=(40, 24), mode="bicubic")
    fast = lraee.accelerate(trunk)
    assert error_of(fast(x), trunk(x)) < 0.035
    with pytest.raises(AssertionError, match="Input height"):
        lraee.accelerate(make_trunk("clip"))(x)


@pytest.mark.parametrize(
    ("trunk", "line"),
    [
        (lambda: vit(global_pool="prr"), r"pools by 'prr'"),
        (
            lambda: eva(use_rot_pos_emb=True, rope_type="mixed"),
            r"rotary positions differ by block and head",
        ),
    ],
)
def test_towers_without_kernels_are_refused(trunk: Any, line: str) -> None:
    with pytest.raises(NotImplementedError, match=line) as refused:
        lraee.accelerate(trunk().eval())
    assert "\n" not in str(refused.value)


def test_blocks_without_kernels_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"accelerate: blocks.0 .*ReLU as mlp.act"):
        lraee.accelerate(vit(act_layer=nn.ReLU).eval())
    with pytest.raises(NotImplementedError, match=r"blocks.0 is a ParallelScalingBlock"):
        from timm.models.vision_transformer import ParallelScalingBlock

        lraee.accelerate(vit(block_fn=ParallelScalingBlock).eval())
    gated = eva()
    gated.blocks[0].attn.gate = nn.Linear(64, 64)
    with pytest.raises(NotImplementedError, match=r"blocks.0 has attn.gate.*gated attention"):
        lraee.accelerate(gated.eval())


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "fastvit_mci0", "beit_base_patch16_224"]
)
def test_other_models_are_refused_in_one_line(name: str) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(NotImplementedError) as refused:
        lraee.accelerate(model.eval())
    line = str(refused.value)
    assert "\n" not in line
    assert ("convolutional" in line and "load " in line) != name.startswith("beit")


def test_masks_are_refused() -> None:
    fast, x = lraee.accelerate(make_trunk("clip")), images(1)
    for options in (
        {"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()},
        {"is_causal": True},
    ):
        with pytest.raises(NotImplementedError, match="must be None"):
            fast(x, **options)
        with pytest.raises(NotImplementedError, match="must be None"):
            fast.forward_features(x, **options)


def test_the_spec_names_what_is_there() -> None:
    trunk = make_trunk("pe_core")
    spec = tower_spec(find_tower(trunk))
    assert (spec.prefix_tokens, spec.tokens, spec.pooling.kind) == (1, 17, "map")
    assert spec.embedding_size == 24 and spec.patch_embedding.size == (8, 8)
    first = block_specs(trunk)[0]
    assert first.attention.rope is not None and first.attention.rope.layout == "interleaved"
    assert not first.is_plain and block_specs(make_trunk("clip"))[0].is_plain
