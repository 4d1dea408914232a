"""The loop of the sweep: items in order, each begun only if its estimate fits the time left."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu_sweep.lines import Results
from lraee.diagnostics.selftest_sizes import Target
from lraee.diagnostics.tuning import Rounds, rounds_on
from lraee.measurement.timing import Timing

Values = Mapping[str, Any]
ERROR_CHARS = 300


@dataclass(frozen=True)
class Context:
    """Where the sweep runs.

    Args:
      target: device and architecture; the CPU stands for the interpreter.
      has_compile: time torch.compile too.
      workers: processes that compile.
    """

    target: Target
    has_compile: bool = False
    workers: int = 1

    @property
    def is_dry(self) -> bool:
        """Whether no GPU is there: tiny shapes, times that mean nothing."""
        return self.target.device.type != "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.float16

    def rounds(self, budget_s: float = 0.3) -> Rounds:
        """Interleaved rounds of captured calls."""
        return rounds_on(self.target, budget_s)


@dataclass(frozen=True)
class Item:
    """One thing to measure: lines for one shape.

    Args:
      shape: names it within its step.
      run: measures; variant -> values of its line.
      variants: that the lines must hold for the item to be known; run may give more.
    """

    shape: str
    run: Callable[[], Mapping[str, Values]]
    variants: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Step:
    """Items of one kind. estimate_s: what an item should take; the longest so far stands in."""

    name: str
    items: Callable[[Context], Iterable[Item]]
    estimate_s: float = 3.0


@dataclass
class Outcome:
    """What a run did: names of items by what became of them."""

    measured: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    no_time: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def sweep(
    steps: Sequence[Step],
    context: Context,
    results: Results,
    end: float,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Runs every item that is not known while time lasts; an item that fails ends itself alone.

    Args:
      steps: in order.
      context: where.
      results: where lines go.
      end: by the clock; an item whose estimate goes beyond it is not begun.
      clock: seconds.
      report: given a line for each item.
    """
    outcome = Outcome()
    for step in steps:
        longest = step.estimate_s
        for item in step.items(context):
            name = f"{step.name} {item.shape}".rstrip()
            if all(results.has(step.name, item.shape, variant) for variant in item.variants):
                outcome.present.append(name)
                continue
            start = clock()
            if start + longest > end:
                outcome.no_time.append(name)
                continue
            is_done = _measure(step, item, results)
            (outcome.measured if is_done else outcome.failed).append(name)
            longest = max(longest, clock() - start)
            report(f"{name}: {'measured' if is_done else 'FAILED'} in {clock() - start:.1f} s")
            if not is_done and _is_lost(context):
                report("the device does not answer any more")
                return outcome
    return outcome


def _measure(step: Step, item: Item, results: Results) -> bool:
    try:
        lines = item.run()
    except Exception as error:  # the others can be measured all the same
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_CHARS]
        for variant in item.variants:
            results.write(step.name, item.shape, variant, {"error": text})
        return False
    for variant, values in lines.items():
        results.write(step.name, item.shape, variant, values)
    return not any("error" in values for values in lines.values())


def _is_lost(context: Context) -> bool:
    if context.is_dry:
        return False
    try:
        torch.cuda.synchronize(context.target.device)
    except RuntimeError:
        return True
    return False


def timed(context: Context, calls: Mapping[str, Callable[[], object]], per: int = 1) -> dict[str, Values]:  # fmt: skip  # noqa: E501
    """A line of median, 20th and 80th percentile in microseconds for each call, in turn."""
    seconds = context.rounds()(calls)
    return {name: line_of(Timing.of([s / per for s in each])) for name, each in seconds.items()}


def line_of(timing: Timing) -> dict[str, float]:
    """Microseconds."""
    return {
        "us": round(1e3 * timing.median_ms, 3),
        "p20_us": round(1e3 * timing.p20_ms, 3),
        "p80_us": round(1e3 * timing.p80_ms, 3),
    }
