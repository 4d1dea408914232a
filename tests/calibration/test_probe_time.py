"""Times of probe, block, copy and tower: what is measured, and what is made of it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration import probe_time
from lraee.calibration.probe_time import BATCHES, OVERHEAD, ProbeTime, measure
from lraee.exits.head import Int8Head
from tests.clip_models import blocks_of, make_model
from tests.exits.random_exits import make_exits, make_head
from tests.support import assert_same

L, D, E = 17, 64, 24


@pytest.mark.parametrize(
    ("tower_us", "probe_us", "share", "most"),
    [
        ((1000.0, 1000.0), (5.0, 5.0), 0.005, 4),
        ((1000.0, 20_000.0), (6.0, 20.0), 0.006, 3),  # the worse of the batch sizes: at batch 1
        ((1000.0, 20_000.0), (5.0, 200.0), 0.01, 2),  # and at batch 32
        ((1000.0, 1000.0), (10.1, 1.0), 0.0101, 1),
        ((1000.0, 1000.0), (500.0, 1.0), 0.5, 1),  # one exit is always allowed
    ],
)
def test_how_many_probes_are_worth_their_time(
    tower_us: tuple[float, ...], probe_us: tuple[float, ...], share: float, most: int
) -> None:
    time = ProbeTime(tower_us, (1.0, 1.0), probe_us, 0.1)
    assert time.probe_share == pytest.approx(share)
    assert time.most_exits == most
    assert most == 1 or most * share <= OVERHEAD


SECONDS = {"tower": 5e-3, "probed": 5.03e-3, "block": 4e-4, "probe": 2e-5, "copy": 1e-4}


@pytest.fixture(params=["added", "alone"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What measure hands to the clock, and what each call gives; the clock's answer is made up:
    a probe takes 30 us, which is what it adds to the tower, or what it takes alone.
    """
    seen: list[dict[str, Any]] = []
    alone = {"tower": 5e-3, "probed": 4.9e-3, "probe": 3e-5}
    seconds = SECONDS if request.param == "added" else SECONDS | alone

    def interleaved(
        variants: Mapping[str, Callable[[], Any]], *, budget_s: float
    ) -> dict[str, list[float]]:
        seen.append({"budget_s": budget_s} | {name: call() for name, call in variants.items()})
        factor = len(seen)  # the larger batch takes twice as long
        return {name: [9.0, factor * seconds[name], factor * seconds[name]] for name in variants}

    monkeypatch.setattr(probe_time, "interleaved", interleaved)
    return seen


@pytest.mark.parametrize("is_batch_first", [True, False])
@pytest.mark.parametrize("has_exits", [True, False])
def test_what_is_timed(calls: list[dict[str, Any]], has_exits: bool, is_batch_first: bool) -> None:
    """The tower at full depth, one block on its tokens, a probe with its decision, and a copy."""
    model = make_model()
    exits = make_exits(model, kind="static") if has_exits else None
    fast = lraee.accelerate(model, exits=exits)
    if not is_batch_first:
        for module in fast.visual.modules():
            if hasattr(module, "batch_first"):
                module.batch_first = False
    head = make_head(D, E, hidden=8, has_class_token=True, seed=0)
    classes = torch.eye(5, E)
    found = measure(fast, 2, head, classes, 20.0, budget_s=0.5)
    assert [call["budget_s"] for call in calls] == [0.5, 0.5]
    assert found.tower_us == pytest.approx((5000.0, 10_000.0))
    assert found.block_us == pytest.approx((400.0, 800.0))
    assert found.probe_us == pytest.approx((30.0, 60.0))
    # 16 of 32 images copied in 200 us, beside 800 us for a block on all 32
    assert found.copy_share == pytest.approx((200 / 16) / (800 / 32))
    source = torch.Generator()
    for B, call in zip(BATCHES, calls, strict=True):
        images = torch.randn(B, 3, 32, 32, generator=source.manual_seed(0))
        z = torch.randn(B, L, D, generator=source.manual_seed(1))
        with torch.no_grad(), lraee.full_depth(fast):
            assert_same(call["tower"], fast.visual(images))
            assert_same(call["probed"], call["tower"])
            tokens = z if is_batch_first else z.transpose(0, 1)
            assert_same(call["block"], blocks_of(fast)[1](tokens))
        scores: Tensor = Int8Head(head, torch.zeros(4))(z, classes, 20.0)[5]
        assert call["probe"] == [score >= 0.5 for score in scores.tolist()]
        assert_same(call["copy"], z[0:B:2])


def test_measured_for_real() -> None:
    """A probe is cheaper than a block, and both than the tower, by far."""
    model: nn.Module = make_model(vision={"width": 128, "layers": 8})
    head = make_head(128, E, hidden=None, has_class_token=False, seed=0)
    found = measure(lraee.accelerate(model), 3, head, torch.eye(5, E), 20.0, budget_s=0.1)
    for tower, block, probe in zip(found.tower_us, found.block_us, found.probe_us, strict=True):
        assert tower > block > 0 and tower > probe > 0
    assert 0 < found.copy_share < 1 and found.most_exits >= 1
