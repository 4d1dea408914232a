"""Early exits of towers with 0, 1 and 5 prefix tokens, pooled by class token, mean or attention."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration.calibrate import calibrate
from lraee.calibration.head_training import HeadOptions
from lraee.calibration.pipeline import Recipe
from lraee.calibration.plans import Rules
from lraee.exits.head import pool, probe_tokens
from lraee.towers.runner import attach_exits
from tests.exits.random_exits import make_exits
from tests.support import assert_same
from tests.towers.timm_models import D, as_timm_model, images, make_trunk

RECIPE = Recipe(
    HeadOptions(kind="affine", steps=30, batch=32, learning_rate=1e-2, weight_decay=0.0),
    Rules(max_exits=2),
    candidates=(2, 3),
)
PREFIX = {"siglip": 0, "mean pool": 0, "pe_core": 1, "clip": 1, "dinov2": 5, "dinov3": 5}

each_tower = pytest.mark.parametrize("family", PREFIX)


@each_tower
def test_images_leave_early_with_the_same_bits_in_any_batch(family: str, tmp_path: Any) -> None:
    trunk, x = make_trunk(family), images(12, seed=4)
    exits = make_exits(trunk, blocks=(1, 2, 3))
    plain, fast = lraee.accelerate(trunk), lraee.accelerate(trunk, exits=exits)
    with lraee.trace(fast) as trace:
        y = fast(x)
    left = trace.exit_block < len(trunk.blocks)
    assert left.any() and not left.all()
    assert 0 < trace.flops_saved < 1
    assert_same(y[~left], plain(x)[~left])
    assert (y[left] != plain(x)[left]).any(1).all()
    for rows in ([0], [3, 1], [8, 2, 11]):
        assert_same(fast(x[rows]), y[rows], rows=rows)
    with lraee.full_depth(fast):
        assert_same(fast(x), plain(x))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(other(x), y)
    lraee.save(fast, tmp_path)
    assert_same(lraee.load(tmp_path, trunk)(x), y)
    assert_same(lraee.restore(fast)(x), trunk(x))


@each_tower
def test_nan_stays_in_its_image(family: str) -> None:
    trunk, x = make_trunk(family), images(6, seed=4)
    fast = lraee.accelerate(trunk, exits=make_exits(trunk))
    y = fast(x)
    x[1] = float("nan")
    kept = [0, 2, 3, 4, 5]
    assert_same(fast(x)[kept], y[kept])


@pytest.mark.parametrize("family", ["mean pool", "pe_core", "dinov2"])
def test_calibrate(family: str) -> None:
    trunk, x = make_trunk(family), images(100)
    with torch.no_grad():
        embedding = trunk(x)
    classes = nn.functional.normalize((embedding - embedding.mean(0))[:5], dim=1)
    exits = calibrate(
        lraee.accelerate(trunk), x, teacher=trunk, classes=classes, recipe=RECIPE,
        is_timed=family == "pe_core", progress=False,
    )  # fmt: skip
    width = 2 * D if PREFIX[family] else D
    assert {head.gamma.shape[0] for head in exits.heads.values()} == {width}
    fast = lraee.accelerate(trunk, exits=exits)
    with lraee.full_depth(fast):
        assert_same(fast(x), lraee.accelerate(trunk)(x))
    assert fast(x).shape == embedding.shape


def test_a_head_learns_from_patches_alone_where_there_is_no_class_token() -> None:
    z = torch.randn(2, 9, 4)
    assert probe_tokens(z, 1) is z
    both: Tensor = pool(probe_tokens(z, 5), has_class_token=True)
    torch.testing.assert_close(both, torch.cat([z[:, 5:].mean(1), z[:, 0]], 1))
    torch.testing.assert_close(pool(probe_tokens(z, 0), has_class_token=False), z.mean(1))


def test_a_head_of_the_class_token_needs_one() -> None:
    exits = make_exits(make_trunk("clip"), blocks=(1,))
    fast = lraee.accelerate(make_trunk("siglip"))
    with pytest.raises(ValueError, match=rf"must have heads \[{D}\] -> \[{D}\], got \[{2 * D}\]"):
        attach_exits(fast, exits.router())
    assert not hasattr(fast, "exits")


def test_in_open_clips_wrapper() -> None:
    model, x = as_timm_model(make_trunk("siglip"), has_projection=True), images(9)
    fast = lraee.accelerate(model, exits=make_exits(model))
    with lraee.trace(fast) as trace:
        y = fast(x)
    assert (trace.exit_block < 4).any()
    assert_same(fast(x[4:5]), y[4:5])
    with lraee.full_depth(fast):
        assert_same(fast(x), lraee.accelerate(model)(x))
