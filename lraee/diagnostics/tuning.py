"""Times the kernels of a tower's linears on this GPU, with what follows each product there.

Every candidate has the bits of the config that runs now, which has those of the definition, before
it is timed. It runs through the weights of as many blocks as a tower has, in a CUDA graph, so that
no weight lies in a cache where it would not in the tower, and no time of the host is counted.
Candidates and the present pick run in interleaved rounds; a candidate wins where its 80th
percentile is below the 20th of the pick.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lraee.diagnostics import product_families as families
from lraee.diagnostics.selftest_sizes import Target
from lraee.diagnostics.selftest_timing import captured, cuda_interleaved
from lraee.diagnostics.tuned_layers import Operands, TunedLayer
from lraee.kernels import int8_linear as launcher
from lraee.kernels.tiling import Config, Shape
from lraee.measurement.timing import Timing, timed_rounds
from lraee.ops import error_bounds, reference

ANY_M = 1 << 31
"""The largest M of the last row of a shape: no limit."""
CHECKED_ROWS = 8
"""Rows that are compared with the definition; all others with the kernel that runs now."""
AT_ONCE = 6
"""Candidates in the rounds of one group, beside the present pick."""

_log = logging.getLogger("lraee")

Rounds = Callable[[Mapping[str, Callable[[], object]]], dict[str, list[float]]]


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
      batches: images of a call.
      copies: weights of each layer.
      most: candidates of each family and shape.
      rounds_s: seconds of timing of each group of candidates.
    """

    batches: tuple[int, ...] = (1, 8, 32, 128)
    copies: int = 12
    most: int = 18
    rounds_s: float = 0.15


FULL = Effort()
TINY = Effort(batches=(1,), copies=1, most=1, rounds_s=0.0)
"""For the interpreter: every line of code runs, and no time means anything."""


@dataclass(frozen=True)
class TimedConfig:
    """One candidate at one shape, a call; `error` says why it was not timed."""

    family: str
    config: list[int]
    timing: Timing | None
    error: str | None = None


@dataclass(frozen=True)
class Tuned:
    """One layer at one number of rows: what runs now, the fastest, and all that was tried."""

    layer: TunedLayer
    M: int
    pick: TimedConfig
    best: TimedConfig
    tried: tuple[TimedConfig, ...]

    @property
    def is_faster(self) -> bool:
        """Whether the fastest is another config than the pick, and not by chance."""
        return self.best is not self.pick


def rounds_on(target: Target, budget_s: float) -> Rounds:
    """Interleaved rounds on this device, of calls as they are replayed from a graph.

    In the interpreter one round, of the calls themselves.
    """
    if target.device.type != "cuda":
        return partial(timed_rounds, rounds=1)

    def rounds(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        graphs = {name: captured(call, target.device) for name, call in calls.items()}
        return cuda_interleaved(graphs, target.device, budget_s=budget_s, warm_s=0.02)

    return rounds


def is_below(one: Timing, other: Timing) -> bool:
    """Whether one is faster than other by more than both spread."""
    return one.p80_ms < other.p20_ms


def tune(
    layers: Sequence[TunedLayer],
    tokens: int,
    target: Target,
    rounds: Rounds,
    *,
    effort: Effort = FULL,
    dtype: torch.dtype = torch.float16,
    budget_s: float = math.inf,
) -> Iterator[Tuned]:
    """Each layer at each batch, the costliest first, until the budget is spent.

    Args:
      layers: of the tower.
      tokens: rows of one image.
      target: where, with its architecture.
      rounds: times calls in turn.
      effort: how much is tried.
      dtype: of the tower's activations.
      budget_s: seconds; a shape is begun only while some are left, and may use its share of them.
    A shape that does not fit into the GPU's memory is left out, with a warning.
    Raises: AssertionError where what runs now does not compute what it is defined to.
    """
    end = time.monotonic() + budget_s
    work = [(layer, batch * tokens) for layer in layers for batch in effort.batches]
    work.sort(key=lambda one: -one[0].N * one[0].K * one[1] * one[0].count)
    refused: dict[str, str] = {}
    for family in families.FAMILIES:
        if (reason := families.failure(family, target)) is not None:
            refused[family.name] = reason
    for i, (layer, M) in enumerate(work):
        left = end - time.monotonic()
        if left <= 0:
            return
        share_end = time.monotonic() + left / (len(work) - i)
        try:
            one = _tune_shape(layer, M, target, rounds, effort, dtype, share_end, refused)
        except torch.cuda.OutOfMemoryError:
            _log.warning("tune: M=%d N=%d K=%d needs more memory than is free", M, layer.N, layer.K)
            torch.cuda.empty_cache()
            continue
        yield one


def _tune_shape(
    layer: TunedLayer, M: int, target: Target, rounds: Rounds, effort: Effort, dtype: torch.dtype,
    share_end: float, refused: Mapping[str, str],
) -> Tuned:  # fmt: skip
    shape = Shape(M, layer.N, layer.K)
    given = Operands.of(layer, M, effort.copies, dtype, target.device)
    chosen = families.present_pick(shape, target, layer.epilogue.name)
    expected = product(given, chosen)
    difference = definition_difference(given, expected)
    assert difference is None, f"{shape}: {difference}"
    tried: list[TimedConfig] = []
    usable: list[Config] = []
    for family in families.FAMILIES:
        for config in family.candidates(shape, target.arch, effort.most, adds=layer.epilogue.adds):
            if config == chosen:
                continue
            error = refused.get(family.name) or _bits_difference(given, config, expected)
            if error is None:
                usable.append(config)
            else:
                tried.append(TimedConfig(family.name, families.numbers(config), None, error))
            if time.monotonic() > share_end and usable:
                break
    times = _in_groups(given, chosen, usable, rounds, share_end)
    timed = {str(config): _timed(config, timing) for config, timing in times}
    pick = timed[str(chosen)]
    rivals = [one for one in timed.values() if _is_faster(one, pick)]
    best = min(rivals, key=lambda one: _median(one), default=pick)
    return Tuned(layer, M, pick, best, (*timed.values(), *tried))


def _in_groups(
    given: Operands, chosen: Config, configs: Sequence[Config], rounds: Rounds, share_end: float
) -> list[tuple[Config, Timing]]:
    """Times of the pick and of candidates, in groups that each hold the pick; the pick's from the
    last, in which it meets the fastest of all groups.
    """
    medians: list[tuple[float, Config]] = []
    for start in range(0, len(configs), AT_ONCE):
        for config, timing in _times(given, (chosen, *configs[start : start + AT_ONCE]), rounds):
            medians.append((timing.median_ms, config))
        if time.monotonic() > share_end:
            break
    others = sorted(
        (one for one in medians if one[1] != chosen), key=lambda one: one[0]
    )[: AT_ONCE // 2]  # fmt: skip
    return _times(given, (chosen, *(config for _, config in others)), rounds)


def _times(
    given: Operands, configs: Sequence[Config], rounds: Rounds
) -> list[tuple[Config, Timing]]:
    calls = {str(config): partial(_through_weights, given, config) for config in configs}
    seconds = rounds(calls)
    per_call = len(given.linears)
    return [(config, Timing.of([s / per_call for s in seconds[str(config)]])) for config in configs]


def _through_weights(given: Operands, config: Config) -> Tensor:
    for linear in given.linears[:-1]:
        launcher.int8_linear(*given.x, linear, config=config, **given.options)
    return product(given, config)


def product(given: Operands, config: Config) -> Tensor:
    """The last weight's, in this config."""
    y: Tensor = launcher.int8_linear(*given.x, given.linears[-1], config=config, **given.options)
    return y


def definition_difference(given: Operands, y: Tensor) -> str | None:
    """Where the first rows of y differ from the definition by more than is derived, or None."""
    first = given.first_rows(CHECKED_ROWS)
    activation = given.options["activation"]
    expected = reference.int8_linear(**first, activation=activation)
    bound = error_bounds.of_linear(first, activation)
    return error_bounds.first_difference(y[:CHECKED_ROWS].cpu(), expected, bound)


def _bits_difference(given: Operands, config: Config, expected: Tensor) -> str | None:
    try:
        y = product(given, config)
    except Exception as error:  # whatever a launch raises is why this config cannot be used
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if torch.equal(y, expected) else "other bits than the kernel that runs now"


def _timed(config: Config, timing: Timing) -> TimedConfig:
    return TimedConfig(config.family, families.numbers(config), timing)


def _is_faster(one: TimedConfig, pick: TimedConfig) -> bool:
    assert pick.timing is not None
    return one.timing is not None and is_below(one.timing, pick.timing)


def _median(one: TimedConfig) -> float:
    assert one.timing is not None
    return one.timing.median_ms


def table_rows(tuned: Sequence[Tuned]) -> list[dict[str, Any]]:
    """Rows of a table of tilings, largest M of each from the numbers of rows that were measured.

    A row holds up to the geometric mean of its M and the next; the last of a shape for any M.
    """
    by_layer: dict[TunedLayer, list[Tuned]] = {}
    for one in tuned:
        by_layer.setdefault(one.layer, []).append(one)
    rows = []
    for layer, each in by_layer.items():
        each = sorted(each, key=lambda one: one.M)
        limits = [math.isqrt(a.M * b.M) for a, b in zip(each, each[1:], strict=False)]
        for one, most in zip(each, [*limits, ANY_M], strict=True):
            rows.append({
                "N": layer.N, "K": layer.K, "most_m": most, "epilogue": layer.epilogue.name,
                "family": one.best.family, "config": one.best.config,
                "us": round(1e3 * _median(one.best), 3),
            })  # fmt: skip
    return rows


def as_record(one: Tuned) -> dict[str, Any]:
    """All that was measured at one shape, for a report."""
    layer = one.layer
    return {
        "M": one.M, "N": layer.N, "K": layer.K, "epilogue": layer.epilogue.name,
        "pick": asdict(one.pick), "best": asdict(one.best),
        "tried": [asdict(each) for each in one.tried],
    }  # fmt: skip
