"""How every benchmark here measures, on top of pytest-benchmark.

Protocol: correctness is asserted first; then all variants run in turn until WARM_S have passed;
then rounds, each of which runs every rival once (in rotating order) and the variant under test
once, timed by pytest-benchmark. A ratio is the median of the ratios of each round, so that a
machine that slows down for a while slows both sides of it. A time is the median, with the 20th and
80th percentile. Weights rotate through as many copies as the real tower has, so that nothing is
found in a cache where the tower would not find it either.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lraee.measurement.timing import WARM_S, Timing, warm_up

BUDGET_S = 3.0
MIN_ROUNDS, MAX_ROUNDS = 7, 300

LINES: list[str] = []
"""Result lines of the benchmark that runs; bench/conftest.py prints them."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work; `run` does all of it once."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What one run costs at least: operations (two for each multiply-add), bytes in and out."""

    ops: int
    size_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Timing of the variant under test and of each rival; ratio > 1: the rival took longer."""

    ours: Timing
    rivals: dict[str, Timing]
    ratios: dict[str, float]


def rotate(arguments: Sequence[tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """A function that hands out the next arguments at each call, round and round."""
    turn = itertools.cycle(arguments)
    return lambda: next(turn)


def copies(tensors: tuple[Tensor, ...], count: int) -> Callable[[], tuple[Tensor, ...]]:
    """`rotate` over `count` copies of the same tensors, each in memory of its own."""
    return rotate([tuple(t.clone() for t in tensors) for _ in range(count)])


def compare(
    benchmark: Any,
    check: Callable[[], None],
    ours: Variant,
    rivals: Sequence[Variant],
    *,
    budget_s: float = BUDGET_S,
    warm_s: float = WARM_S,
) -> Comparison:
    """Times `ours` against `rivals` by the protocol of this file.

    Args:
      benchmark: the fixture of pytest-benchmark.
      check: raises unless every variant computes the right result; called before any timing.
      ours: the variant under test.
      rivals: what a user would run otherwise.
      budget_s: wall time to spend on rounds, within MIN_ROUNDS..MAX_ROUNDS rounds.
      warm_s: wall time to spend on warming up.
    """
    check()
    runs = [variant.run for variant in (ours, *rivals)]
    rounds = warm_up(runs, budget_s, warm_s, least=MIN_ROUNDS, most=MAX_ROUNDS)
    samples: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    order = list(rivals)

    def run_rivals() -> None:
        for rival in order:
            start = time.perf_counter()
            rival.run()
            samples[rival.name].append(time.perf_counter() - start)
        order.append(order.pop(0))

    benchmark.pedantic(ours.run, setup=run_rivals if rivals else None, rounds=rounds)
    seconds = list(benchmark.stats.stats.data)
    comparison = Comparison(
        ours=Timing.of(seconds),
        rivals={name: Timing.of(each) for name, each in samples.items()},
        ratios={
            name: statistics.median(r / o for r, o in zip(each, seconds, strict=True))
            for name, each in samples.items()
        },
    )
    benchmark.extra_info.update(asdict(comparison) | {"variant": ours.name, "rounds": rounds})
    return comparison


def line(title: str, shape: str, result: Comparison, work: Work) -> str:
    """One aligned line: layer | time (p20-p80) | rate | traffic | ratio to each rival."""
    unit, scale = ("us", 1e3) if result.ours.median_ms < 10 else ("ms", 1.0)
    t = result.ours
    time_text = f"{t.median_ms * scale:8.1f} {unit} ({t.p20_ms * scale:.1f}-{t.p80_ms * scale:.1f})"
    cells = [
        f"{title:<20} {shape:<30}",
        f"{time_text:<30}",
        *([f"{work.ops / t.median_ms / 1e9:6.3f} TOPS"] if work.ops else []),
        *([f"{work.size_bytes / t.median_ms / 1e6:6.1f} GB/s"] if work.size_bytes else []),
        "  ".join(f"{ratio:5.2f}x {name}" for name, ratio in result.ratios.items()),
    ]
    return " | ".join(cells)


def record(
    benchmark: Any, title: str, shape: str, result: Comparison, work: Work | None = None
) -> None:
    """Prints the line and adds its numbers to the JSON of pytest-benchmark."""
    work = work or Work(0, 0)
    text = line(title, shape, result, work)
    benchmark.extra_info.update({"title": title, "shape": shape, "line": text} | asdict(work))
    LINES.append(text)
