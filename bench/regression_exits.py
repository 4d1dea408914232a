"""Early exits and full depth in one process: fails when exits save no time, or cost too much.

Margins are wide, for shared machines; what was measured on a quiet one is in
docs/notes/exits.md. The
statistic is the median over rounds of the ratio of one round.
"""

import math
from dataclasses import replace
from statistics import median
from typing import cast

import pytest
import torch
from torch import nn

import lraee
from bench.exit_time import SHARES, random_exits, run, spread
from bench.shapes import B32
from lraee.calibration.probe_time import measure
from lraee.exits.head import HeadWeights
from lraee.measurement.timing import interleaved
from lraee.towers.families import find_tower
from lraee.towers.runner import exits_of
from lraee.zoo.opening import open_model

BUDGET_S = 15.0
ATTEMPTS = 3
"""What else runs on the machine makes exits look worse, not better: slow code fails every time."""
MOST_OVERHEAD = 0.10
"""Of the probes at which no image exits, on ViT-B/32; 0.02 is promised on a quiet machine."""
LEAST_SHARE = 0.5
"""Of the FLOPs saved, the time saved; 0.8 is promised on a quiet machine."""


ONE_EXIT = {6: 0.5}
"""Share of photos that leave, where the break-even rule allows one probe: on AMX, where the tower
is so fast that a probe is 1 to 5 % of it. Half of the photos leave half-way, so that what is saved,
a quarter, stands out of what a probe, the copying and an odd number of images a thread cost.
"""


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Those that the thresholds are set on, so that the shares that leave are known."""
    return torch.randn(32, 3, B32.image_px, B32.image_px, generator=torch.manual_seed(0))


@pytest.fixture(scope="module")
def fast(images: torch.Tensor) -> nn.Module:
    """ViT-B/32 with random weights and as many random heads as calibrate would allow here."""
    model = open_model(B32.open_clip, may_be_random=True).model
    plain = lraee.accelerate(model)
    exits = random_exits(plain)
    assert exits.classes is not None
    block, head = next(iter(exits.heads.items()))
    time = measure(plain, block, cast(HeadWeights, head), exits.classes, exits.logit_scale)
    shares = SHARES if time.most_exits >= len(SHARES) else ONE_EXIT
    built = spread(model, random_exits(plain, shares), images, shares)
    return lraee.accelerate(model, exits=built)


@pytest.mark.parametrize("batch", [1, 32])
def test_exits_save_time_and_cost_little(fast: nn.Module, images: torch.Tensor, batch: int) -> None:
    router = exits_of(find_tower(fast))
    assert router is not None
    opened = router.gate
    closed = replace(opened, thresholds=(math.inf,) * len(opened.thresholds))

    def at_full_depth() -> None:
        with lraee.full_depth(fast):
            run(fast, images, batch)

    def no_image_exits() -> None:
        router.gate = closed
        run(fast, images, batch)
        router.gate = opened

    with torch.inference_mode():
        with lraee.trace(fast) as t:
            run(fast, images, batch)
        calls = {
            "full": at_full_depth,
            "exits": lambda: run(fast, images, batch),
            "closed": no_image_exits,
        }
        assert t.flops_saved > 0.02, "photos must leave for this to be a test"
        least = LEAST_SHARE * t.flops_saved - 0.02
        for attempt in range(1, ATTEMPTS + 1):
            saved, overhead = ratios(interleaved(calls, budget_s=BUDGET_S))
            if saved > least and overhead < MOST_OVERHEAD:
                return
            print(f"attempt {attempt}: {saved:.3f} of the time saved, overhead {overhead:+.3f}")
    assert saved > least, (saved, t.flops_saved)
    assert overhead < MOST_OVERHEAD, overhead


def ratios(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """Share of the time that exits save, and what they add where no image exits."""

    def ratio(name: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds["full"], strict=True))

    return 1.0 - ratio("exits"), ratio("closed") - 1.0
