"""full_depth and trace: nested, after errors, over many calls; and sums of what exits did."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.model.trace import ExitStats, has_exits
from lraee.towers.flops import PartFlops, probe_flops
from tests.clip_models import VARIANTS, make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import assert_same

LAYERS = 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model()


@pytest.fixture
def fast(model: nn.Module) -> nn.Module:
    return lraee.accelerate(model, exits=make_exits(model, kind="learned"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return make_images(12)


class Broken(Exception):
    pass


@torch.no_grad()
def test_full_depth_may_be_nested_and_left_by_an_error(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    plain, early = lraee.accelerate(model).encode_image(images), fast.encode_image(images)
    assert not torch.equal(plain, early)
    with lraee.full_depth(fast):
        with lraee.full_depth(fast):
            assert_same(fast.encode_image(images), plain)
        assert_same(fast.encode_image(images), plain)
        with pytest.raises(Broken), lraee.full_depth(fast):
            raise Broken
        assert_same(fast.encode_image(images), plain)
    assert_same(fast.encode_image(images), early)
    with pytest.raises(Broken), lraee.full_depth(fast):
        raise Broken
    assert_same(fast.encode_image(images), early)


@torch.no_grad()
def test_full_depth_is_of_one_model(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    other = lraee.accelerate(model, exits=make_exits(model, kind="confidence"))
    early, plain = other.encode_image(images), lraee.accelerate(model).encode_image(images)
    with lraee.full_depth(fast):
        assert_same(other.encode_image(images), early)
        with lraee.full_depth(other):
            assert_same(other.encode_image(images), plain)
        assert_same(other.encode_image(images), early)
    with lraee.full_depth(model):  # a float model has nothing to switch off
        assert_same(model.encode_image(images), model.encode_image(images))


@torch.no_grad()
def test_traces_collect_all_calls_in_order(fast: nn.Module, images: Tensor) -> None:
    with lraee.trace(fast) as whole:
        fast.encode_image(images)
    with lraee.trace(fast) as parts:
        for part in images.split(5):
            fast.encode_image(part)
    assert_same(parts.exit_block, whole.exit_block)
    assert_same(parts.scores, whole.scores)
    assert_same(parts.features, whole.features)
    assert parts.stats.share == whole.stats.share
    assert parts.stats.expected_flops == whole.stats.expected_flops
    # Where an image did not come there is nothing: it has left, or not been so deep
    left = whole.exit_block
    assert_same(whole.scores.isnan(), torch.stack([left < 1, left < 2], 1))
    assert_same(whole.features.isnan().all(2), whole.scores.isnan())


@torch.no_grad()
def test_nested_traces(fast: nn.Module, images: Tensor) -> None:
    """The inner one takes the calls inside it; an error ends it like any other end."""
    with lraee.trace(fast) as outer:
        fast.encode_image(images[:3])
        with pytest.raises(Broken), lraee.trace(fast) as inner:
            fast.encode_image(images[:4])
            raise Broken
        fast.encode_image(images[:5])
    fast.encode_image(images)
    assert (len(outer.exit_block), len(inner.exit_block)) == (8, 4)


@torch.no_grad()
def test_an_empty_trace(fast: nn.Module) -> None:
    with lraee.trace(fast) as t:
        pass
    assert t.exit_block.shape == (0,) and t.exit_block.dtype == torch.int64
    assert t.scores.shape == (0, 2) and t.features.shape == (0, 2, 3)
    assert t.flops_saved == 0.0
    assert t.stats == ExitStats(0, (0.0, 0.0, 0.0), 0, 0, 0)


@torch.no_grad()
def test_figures_by_hand(fast: nn.Module, images: Tensor) -> None:
    with lraee.trace(fast) as t:
        fast.encode_image(images)
        with lraee.full_depth(fast):
            fast.encode_image(images[:2])  # pays no probe
    parts, probes = PartFlops.as_run(fast.visual), probe_flops(fast.visual.exits)
    cost = dict(zip((1, 2, LAYERS), parts.when_leaving((1, 2), probes), strict=True))
    depths = t.exit_block.tolist()
    assert depths[12:] == [LAYERS, LAYERS] and len(set(depths)) == 3
    stats = t.stats
    assert stats.images == 14 and stats.full_flops == 14 * parts.total
    assert stats.share == tuple(depths.count(depth) / 14 for depth in (1, 2, LAYERS))
    assert stats.expected_flops == sum(cost[depth] for depth in depths[:12]) + 2 * parts.total
    assert stats.run_flops >= stats.expected_flops
    assert t.flops_saved == 1 - stats.run_flops / (14 * parts.total)


def test_stats_of_two_parts_are_those_of_the_whole(fast: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        result: list[ExitStats] = []
        for part in (images[:5], images[5:]):
            with lraee.trace(fast) as t:
                fast.encode_image(part)
            result.append(t.stats)
    total = result[0] + result[1]
    assert total.images == 12
    for name in ("full_flops", "expected_flops", "run_flops"):
        assert getattr(total, name) == getattr(result[0], name) + getattr(result[1], name)
    shares = zip(total.share, result[0].share, result[1].share, strict=True)
    for share, first, second in shares:
        assert share == pytest.approx((5 * first + 7 * second) / 12)
    empty = ExitStats(0, (0.0, 0.0, 0.0), 0, 0, 0)
    assert total + empty == empty + total == total
    assert empty + empty == empty and empty.flops_saved == 0.0


def test_stats_by_hand() -> None:
    first = ExitStats(3, (1.0, 0.0), 300, 150, 180)
    second = ExitStats(1, (0.0, 1.0), 100, 100, 110)
    assert first + second == ExitStats(4, (0.75, 0.25), 400, 250, 290)
    assert (first + second).flops_saved == pytest.approx(0.275)
    with pytest.raises(ValueError):
        first + ExitStats(1, (1.0,), 1, 1, 1)  # noqa: B018


def test_has_exits(model: nn.Module, fast: nn.Module) -> None:
    assert has_exits(fast) and has_exits(fast.visual)
    assert not has_exits(model) and not has_exits(lraee.accelerate(model))
    assert not has_exits(nn.Linear(2, 2))


@pytest.mark.parametrize("variant", ["plain", "custom_text", "pool_avg", "no_ln_pre", "mlp_ratio"])
@torch.no_grad()
def test_towers_of_all_kinds(variant: str, images: Tensor) -> None:
    """Full depth is plain int8; with exits at least one image leaves early."""
    options: dict[str, Any] = VARIANTS[variant]
    model = make_model(**options)
    fast = lraee.accelerate(model, exits=make_exits(model, kind="agreement"))
    with lraee.trace(fast) as t:
        fast.encode_image(images)
    assert t.flops_saved > 0
    with lraee.full_depth(fast):
        assert_same(fast.encode_image(images), lraee.accelerate(model).encode_image(images))
