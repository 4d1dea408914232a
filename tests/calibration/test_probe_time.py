"""Times of probe, block, copy and tower: what is measured, and what follows from it."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import lraee
from lraee.calibration import probe_time
from lraee.calibration.probe_time import (
    BATCHES,
    MAX_READINGS,
    MIN_SPREAD,
    OVERHEAD,
    ProbeTime,
    Readings,
    measure,
    take_readings,
)
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


class FakeMachine:
    """A clock, and calls that take as long as they are told; other work makes them longer.

    Args:
      seconds: of each call on a quiet machine.
      load: number of the call, from 0 on -> factor of its time.
    """

    def __init__(self, seconds: Mapping[str, float], load: Callable[[int], float]) -> None:
        self.now, self.count, self._load = 100.0, 0, load
        self.calls = {name: lambda each=each: self.run(each) for name, each in seconds.items()}

    def run(self, seconds: float) -> None:
        self.now += seconds * self._load(self.count)
        self.count += 1

    def clock(self) -> float:
        return self.now


SECONDS = {"tower": 5e-3, "block": 4e-4, "probed": 5.03e-3, "probe": 2e-5, "copy": 1e-4}
ALONE = SECONDS | {"probed": 4.9e-3, "probe": 3e-5}


def readings_under(
    load: Callable[[int], float], seconds: Mapping[str, float] = SECONDS
) -> Readings:
    machine = FakeMachine(seconds, load)
    return take_readings(machine.calls, budget_s=0.1, clock=machine.clock)


@pytest.mark.parametrize("seconds", [SECONDS, ALONE])
def test_a_quiet_machine_is_read_three_times(seconds: dict[str, float]) -> None:
    """A probe takes 30 us: what it adds to the tower, or what it takes alone."""
    readings = readings_under(lambda count: 1.0, seconds)
    assert len(readings.shares) == 3 and readings.is_conclusive
    assert readings.share == pytest.approx(0.006)
    assert readings.seconds == pytest.approx(seconds)


def test_exits_on_the_device_cost_what_they_add() -> None:
    """No probe is started apart there; what cannot be told from nothing counts as MIN_SPREAD."""
    seconds = {name: each for name, each in SECONDS.items() if name != "probe"}
    assert readings_under(lambda count: 1.0, seconds).share == pytest.approx(0.006)
    seconds["probed"] = 4.9e-3
    readings = readings_under(lambda count: 1.0, seconds)
    assert readings.is_conclusive and readings.share == MIN_SPREAD
    share = readings.share
    assert ProbeTime((1.0,), (0.1,), (share,), 0.1).most_exits == int(OVERHEAD / MIN_SPREAD)


def test_bursts_of_load_do_not_count() -> None:
    """Other work for 40 calls of every 100 triples their time."""
    readings = readings_under(lambda count: 3.0 if count % 100 < 40 else 1.0)
    assert readings.is_conclusive and readings.share == pytest.approx(0.006)


def test_random_load_does_not_count() -> None:
    source = random.Random(0)
    readings = readings_under(lambda count: 1.0 + max(0.0, source.gauss(0.0, 1.0)))
    assert readings.is_conclusive
    assert readings.share == pytest.approx(0.006, abs=MIN_SPREAD)


def test_a_slower_clock_rate_slows_both_sides() -> None:
    readings = readings_under(lambda count: 1.0 + count / 5000)
    assert readings.is_conclusive and readings.share == pytest.approx(0.006, abs=2 * MIN_SPREAD)


def test_readings_that_differ_are_not_conclusive() -> None:
    """The smallest times give 0.006; three readings must lie near it."""
    shares = (0.09, 0.0061, 0.05, 0.006, 0.0062)
    conclusive = [Readings(SECONDS, shares[:n]).is_conclusive for n in range(1, 6)]
    assert conclusive == [False] * 4 + [True]
    assert Readings(SECONDS, shares).share == pytest.approx(0.006)
    assert Readings(SECONDS, shares).spread == pytest.approx(0.0002)
    assert Readings(SECONDS, shares[:2]).spread == math.inf


def test_a_machine_that_never_agrees_is_inconclusive() -> None:
    """Every call of the probed tower is slowed by another amount, further and further."""
    machine = FakeMachine(SECONDS, lambda count: 1.0)
    slowed = machine.calls | {"probed": lambda: machine.run(5e-3 * (1.0 + machine.count / 100))}
    readings = take_readings(slowed, budget_s=0.1, clock=machine.clock)
    assert len(readings.shares) == MAX_READINGS and not readings.is_conclusive
    assert readings.share == min(readings.shares) > 0.05


class Recorder:
    """In the place of take_readings: what each call gives, and readings that were made up."""

    def __init__(self, shares: tuple[float, ...]) -> None:
        self.results: list[dict[str, Any]] = []
        self.shares = shares

    def __call__(
        self, calls: Mapping[str, Callable[[], Any]], *, budget_s: float, clock: Any
    ) -> Readings:
        self.results.append({"budget_s": budget_s} | {name: call() for name, call in calls.items()})
        factor = len(self.results)  # the larger batch takes twice as long
        return Readings({name: factor * each for name, each in SECONDS.items()}, self.shares)


@pytest.mark.parametrize("is_batch_first", [True, False])
@pytest.mark.parametrize("has_exits", [True, False])
def test_what_is_timed(
    monkeypatch: pytest.MonkeyPatch, has_exits: bool, is_batch_first: bool
) -> None:
    """The tower at full depth, one block on its tokens, a probe with its decision, and a copy."""
    recorder = Recorder((0.006, 0.0062, 0.0061))
    monkeypatch.setattr(probe_time, "take_readings", recorder)
    model = make_model()
    if not is_batch_first:
        for module in model.visual.modules():
            if hasattr(module, "batch_first"):
                module.batch_first = False
    exits = make_exits(model, kind="static") if has_exits else None
    fast = lraee.accelerate(model, exits=exits)
    head = make_head(D, E, hidden=8, has_class_token=True, seed=0)
    classes = torch.eye(5, E)
    time = measure(fast, 2, head, classes, 20.0, budget_s=0.5)
    assert [call["budget_s"] for call in recorder.results] == [0.5, 0.5]
    assert time.tower_us == pytest.approx((5000.0, 10_000.0))
    assert time.block_us == pytest.approx((400.0, 800.0))
    assert time.probe_us == pytest.approx((30.0, 60.0))
    # 16 of 32 images copied in 200 us, beside 800 us for a block on all 32
    assert time.copy_share == pytest.approx((200 / 16) / (800 / 32))
    assert time.spread == pytest.approx((0.0002, 0.0002)) and time.readings == (3, 3)
    assert time.is_conclusive
    source = torch.Generator()
    for B, call in zip(BATCHES, recorder.results, strict=True):
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


def test_an_inconclusive_measurement_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shares = tuple(0.006 + 0.01 * i for i in range(MAX_READINGS))
    monkeypatch.setattr(probe_time, "take_readings", Recorder(shares))
    head = make_head(D, E, hidden=None, has_class_token=False, seed=0)
    time = measure(lraee.accelerate(make_model()), 2, head, torch.eye(5, E), 20.0)
    assert not time.is_conclusive and time.readings == (MAX_READINGS, MAX_READINGS)
    assert time.probe_share == pytest.approx(0.006)
    assert caplog.messages[0] == (
        "calibrate: probe time is inconclusive: 0.6 % of the tower's time at batch 1, spread 2.0"
        " points over 12 readings; the machine is busy, give num_exits or measure again"
    )


def test_a_real_model_is_measured() -> None:
    """Every figure is there, whatever else the machine does: no time is compared with another."""
    head = make_head(D, E, hidden=None, has_class_token=False, seed=0)
    time = measure(lraee.accelerate(make_model()), 2, head, torch.eye(5, E), 20.0, budget_s=0.01)
    figures = (*time.tower_us, *time.block_us, *time.probe_us, time.copy_share)
    assert all(0.0 < each < math.inf for each in figures) and time.most_exits >= 1
    assert all(3 <= count <= MAX_READINGS for count in time.readings)
    assert all(math.isfinite(each) for each in time.spread)
