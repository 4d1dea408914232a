"""Cached features equal those of running the towers."""

from typing import Any

import torch

from lraee.calibration.collect import Pair
from lraee.exits.head import pool
from lraee.storage.stages import Stages
from lraee.study.cached_features import CachedFeatures, spread, tokens_like
from lraee.study.trials import Trial
from tests.small_calibration import QUICK, pictures
from tests.study.small_study import small_form, small_model
from tests.support import assert_same


def test_three_tokens_are_like_all() -> None:
    z = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    few = tokens_like(pool(z, has_class_token=True), spread(z))
    torch.testing.assert_close(pool(few, has_class_token=True), pool(z, has_class_token=True))
    torch.testing.assert_close(spread(few), spread(z))
    by_hand = torch.stack([each[1:].var(0, correction=0).sum() for each in z])
    torch.testing.assert_close(spread(z), by_hand)


def test_probes_of_kept_tokens_are_those_of_the_tower() -> None:
    form = small_form("int8")
    heads = Trial(form, QUICK, 0, has_labels=False).features.heads
    rows = torch.arange(120) % 3 > 0
    options: dict[str, Any] = {"classes": small_model().classes, "logit_scale": 20.0}
    result = form.report.probed(heads, rows, **options)
    expected = form.report.pair.probed(heads, rows, **options)
    # Pooled values are kept as float16: a step of 2^-11 where int8 steps are 1/127
    assert float((result["top1"] == expected["top1"]).double().mean()) > 0.97
    torch.testing.assert_close(result["embedding"], expected["embedding"], rtol=0.1, atol=0.1)
    torch.testing.assert_close(
        result["features"][..., 2], expected["features"][..., 2], rtol=1e-4, atol=1e-4
    )


def test_the_class_token_can_lead() -> None:
    form = small_form("int8")
    rows = torch.ones(120, dtype=torch.bool)
    as_kept = form.report.pooled([3], rows, view_seed=None)["pooled"][:, 0]
    led = form.leading("class token").report.pooled([3], rows, view_seed=None)["pooled"][:, 0]
    D = as_kept.shape[1] // 2
    assert_same(led[:, :D], as_kept[:, D:])
    assert_same(led[:, D:], as_kept[:, :D])


def test_a_view_is_made_once_for_all_seeds() -> None:
    form = small_form("int8")
    rows = torch.ones(200, dtype=torch.bool)
    views = [form.learn.pooled([4], rows, view_seed=seed)["pooled"] for seed in (None, 1, 1001)]
    assert_same(views[1], views[2])
    assert float((views[0] - views[1]).abs().max()) > 0.01  # another crop


def test_a_pass_is_read_again(tmp_path: Any) -> None:
    model, images = small_model(), pictures(30)

    def cached() -> CachedFeatures:
        stages = Stages(tmp_path / "work", {"model": "small"})
        pair = Pair(model.clip, small_form("int8").learn.fast, images, batch=64, progress=False)
        return CachedFeatures(pair, name="a", teacher_name="t", stages=stages)

    first = cached().view(0)
    again = cached()
    again._pass = None  # type: ignore[assignment,method-assign]
    for name, tensor in again.view(0).items():
        assert_same(tensor, first[name], name=name)


def test_noise_is_of_images_spread_evenly() -> None:
    form = small_form("int8")
    rows = torch.arange(8) * 200 // 8
    images = pictures(200)[rows]
    pair = Pair(form.learn.teacher, form.learn.fast, images, batch=64, progress=False)
    assert form.learn.leading("mean").noise(8) == pair.noise(8)
