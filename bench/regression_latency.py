"""Latency of the INT8 tower against float32 in the same process: fails when INT8 lost its lead.

The statistic is the median over rounds of (time of one) / (time of the other). The guard must not
cry wolf either: INT8 against INT8, through the same statistic, has to stay inside the margin.
"""

import copy
from typing import Any

import pytest
import torch

import lraee
from bench.bench_tower import image_tower, load
from bench.harness import Comparison, Variant, Work, compare, record
from bench.shapes import B32
from lraee import _C

BATCHES = (1, 8)
BUDGET_S = 15.0
MARGIN = 1.35
"""For shared machines: under load 2.8x to 3.8x was seen where a quiet run gives 4.3x to 5.3x."""

FLOAT32_OVER_INT8 = {
    "amx": {1: 4.0, 8: 4.0},
    "avx512_vnni": {1: 3.3, 8: 3.0},
    "avx_vnni": {1: 2.0, 8: 2.0},
    "avx2": {1: 1.35, 8: 1.35},
}
"""By which factor INT8 leads at each instruction set, set below what was measured at batch 1 and 8
on a Zen 4 with two threads, quiet: avx512_vnni 6.1 and 4.4, avx_vnni 4.3 and 3.6, avx2 2.1 and 1.25
(that last below the promise, above the alarm).
"""


def _alarms(ratio: float, expected: float) -> bool:
    """Whether the rival, here float32, comes closer than the margin allows."""
    return ratio < expected / MARGIN


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The float32 tower and its INT8 form."""
    model = load(B32)
    return image_tower(model), image_tower(lraee.accelerate(model))


def _compare(
    benchmark: Any, ours: torch.nn.Module, rival: torch.nn.Module, name: str, batch: int
) -> Comparison:
    images = torch.randn(batch, 3, B32.image_px, B32.image_px)

    def check() -> None:
        cosine = torch.cosine_similarity(ours(images), rival(images)).min().item()
        assert cosine > 0.98, cosine

    variants = [Variant(name, lambda: rival(images))]
    result = compare(
        benchmark, check, Variant("lraee", lambda: ours(images)), variants, budget_s=BUDGET_S
    )
    record(benchmark, B32.name, f"batch {batch}", result, Work(batch * B32.flops, 0))
    return result


@pytest.mark.parametrize("batch", BATCHES)
def test_int8_leads_float32(
    benchmark: Any, pair: tuple[torch.nn.Module, torch.nn.Module], batch: int
) -> None:
    isa = _C.isa()
    if isa not in FLOAT32_OVER_INT8:
        pytest.skip(f"no lead is promised at instruction set {isa}")
    floats, fast = pair
    ratio = _compare(benchmark, fast, floats, "torch fp32", batch).ratios["torch fp32"]
    expected = FLOAT32_OVER_INT8[isa][batch]
    assert not _alarms(ratio, expected), (
        f"INT8 leads float32 by {ratio:.2f}x at batch {batch}, expected {expected}x / {MARGIN}"
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_a_against_a_does_not_alarm(
    benchmark: Any, pair: tuple[torch.nn.Module, torch.nn.Module], batch: int
) -> None:
    _, fast = pair
    result = _compare(benchmark, fast, copy.deepcopy(fast), "lraee again", batch)
    ratio = result.ratios["lraee again"]
    assert not _alarms(ratio, 1.0) and not _alarms(1.0 / ratio, 1.0), ratio


def test_a_lost_lead_alarms() -> None:
    """The guard can fail: equal speed at a promised factor of two is an alarm."""
    assert _alarms(1.0, 2.0)
    assert not _alarms(2.0, 2.0)
