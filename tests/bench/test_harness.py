"""The benchmark harness: checks first, takes turns, and reports medians of paired ratios."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import harness
from bench.harness import Comparison, Variant, Work, compare, copies, line
from lraee.measurement.timing import Timing


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that the harness uses; counts a call as 2 ms."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, run: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            run()
            self.stats.stats.data.append(0.002)


def test_wrong_results_are_not_timed() -> None:
    timed: list[str] = []

    def check() -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        compare(FakeBenchmark(), check, Variant("ours", lambda: timed.append("ours")), [])
    assert timed == []


def test_variants_take_turns() -> None:
    """Each round runs each variant once; the rivals' order rotates, ours comes last."""
    recorded: list[str] = []
    variants = [Variant(name, lambda name=name: recorded.append(name)) for name in "abc"]  # type: ignore[misc]
    benchmark = FakeBenchmark()
    compare(benchmark, lambda: None, variants[0], variants[1:], budget_s=0.0, warm_s=0.0)
    rounds = benchmark.extra_info["rounds"]
    assert rounds == harness.MIN_ROUNDS
    measured = "".join(recorded[-3 * rounds :])
    assert measured == ("bca" + "cba") * (rounds // 2) + "bca" * (rounds % 2)


def test_ratio_is_of_paired_rounds() -> None:
    result = compare(
        FakeBenchmark(),
        lambda: None,
        Variant("ours", lambda: None),
        [Variant("slower", lambda: time.sleep(0.004))],
        budget_s=0.05,
        warm_s=0.0,
    )
    assert result.ours == Timing(2.0, 2.0, 2.0)
    assert result.rivals["slower"].median_ms >= 4
    assert result.ratios["slower"] == pytest.approx(result.rivals["slower"].median_ms / 2)


def test_percentiles_by_hand() -> None:
    seconds = [float(i) for i in range(11)]
    assert Timing.of(seconds) == Timing(5e3, 2e3, 8e3)


def test_copies_rotate_through_memory_of_their_own() -> None:
    w = torch.arange(4)
    hand_out = copies((w,), 3)
    first, second, third, again = (hand_out()[0] for _ in range(4))
    assert len({t.data_ptr() for t in (w, first, second, third)}) == 4
    assert again is first and torch.equal(third, w)


def test_line_by_hand() -> None:
    result = Comparison(Timing(41.2e-3, 40.8e-3, 42e-3), {}, {"torch bf16": 2.31})
    text = line("ViT-B/32 mlp.fc1", "M=50 N=3072 K=768", result, Work(235_929_600, 2_705_000))
    cells = [cell.strip() for cell in text.split("|")]
    assert cells[0].split() == ["ViT-B/32", "mlp.fc1", "M=50", "N=3072", "K=768"]
    assert cells[1:] == ["41.2 us (40.8-42.0)", "5.726 TOPS", "65.7 GB/s", "2.31x torch bf16"]
    assert "TOPS" not in line("tower", "batch 1", result, Work(0, 0))
