"""How long a probe and a copy of survivors take beside the tower, on this machine.

Other work on the machine only adds to a time, so the smallest counts. A reading is the smallest
time of each call over a few interleaved rounds; readings are repeated until enough of them agree
with the smallest times of all.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights, Int8Head, contrasts, probe_tokens
from lraee.exits.router import Router
from lraee.model.trace import full_depth
from lraee.towers.device_exits import decides_on_device
from lraee.towers.families import (
    as_input,
    block_specs,
    blocks_of,
    device_of,
    find_tower,
    tower_spec,
)
from lraee.towers.runner import attach_exits

_log = logging.getLogger("lraee")

BATCHES = (1, 32)
OVERHEAD = 0.02
"""Probes together may take this share of the full-depth tower's time: what a batch in which no
image exits can lose."""

AGREEING = 3
"""Readings that must agree with the result for a measurement to be conclusive."""
MAX_READINGS = 12
TOLERANCE = 0.25
"""Largest spread of the agreeing readings, relative to the result."""
MIN_SPREAD = 0.1 * OVERHEAD
"""A spread below this changes no decision, however small the reading."""

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Readings:
    """Paired readings of one batch size.

    Args:
      seconds: smallest time of each call over all readings.
      shares: time of a probe over that of the tower, one per reading.
    """

    seconds: Mapping[str, float]
    shares: tuple[float, ...]

    @property
    def share(self) -> float:
        """Time of a probe over that of the tower, from the smallest times of all readings."""
        return _share_of(self.seconds)

    @property
    def spread(self) -> float:
        """How far the AGREEING nearest readings lie from `share`; inf where there are fewer."""
        distances = sorted(abs(each - self.share) for each in self.shares)
        return distances[AGREEING - 1] if len(distances) >= AGREEING else math.inf

    @property
    def is_conclusive(self) -> bool:
        """Whether enough readings agree."""
        return self.spread <= max(TOLERANCE * self.share, MIN_SPREAD)


@dataclass(frozen=True)
class ProbeTime:
    """Smallest times in microseconds; one figure for each batch of BATCHES.

    Args:
      tower_us: a call at full depth.
      block_us: one block.
      probe_us: what one probe and the gate's decision add to a call.
      copy_share: copying one image's tokens over one block on it, in the larger batch.
      spread: of the share of time that a probe takes, see Readings; a share as well.
      readings: how many were taken.
      is_conclusive: whether the readings of each batch size agree.
    """

    tower_us: tuple[float, ...]
    block_us: tuple[float, ...]
    probe_us: tuple[float, ...]
    copy_share: float
    spread: tuple[float, ...] = ()
    readings: tuple[int, ...] = ()
    is_conclusive: bool = True

    @property
    def probe_share(self) -> float:
        """Time of a probe over that of the tower, the larger of the batch sizes."""
        pairs = zip(self.probe_us, self.tower_us, strict=True)
        return max(probe / tower for probe, tower in pairs)

    @property
    def most_exits(self) -> int:
        """How many probes stay within OVERHEAD; one at least."""
        return max(1, int(OVERHEAD / self.probe_share))


@torch.inference_mode()
def measure(
    model: nn.Module,
    block: int,
    head: HeadWeights,
    classes: Tensor,
    logit_scale: float,
    *,
    budget_s: float = 2.0,
    clock: Clock = time.perf_counter,
) -> ProbeTime:
    """Times an accelerated model at full depth, without and with an exit that no image takes.

    Inside the tower a probe finds its weights out of the cache and costs twice what it costs in a
    loop of its own, at batch 1; the larger of both counts, as noise may hide the difference. Where
    exits are decided on the device the difference alone counts: a call there starts no probe and
    waits for no answer of its own. Readings that do not agree are inconclusive, and
    one line of the log says so.

    Args:
      model: from lraee.accelerate.
      block: depth of the probe.
      head, classes, logit_scale: of the probe.
      budget_s: for AGREEING readings at each batch size; a machine under load takes up to
        MAX_READINGS / AGREEING times as long.
      clock: seconds.
    """
    by_batch = []
    for B in BATCHES:
        calls = calls_of(model, block, head, classes, logit_scale, B)
        with full_depth(model):
            by_batch.append(take_readings(calls, budget_s=budget_s, clock=clock))
    for B, each in zip(BATCHES, by_batch, strict=True):
        if not each.is_conclusive:
            _log.warning(
                "calibrate: probe time is inconclusive: %.1f %% of the tower's time at batch %d,"
                " spread %.1f points over %d readings; the machine is busy, give num_exits or"
                " measure again", 100 * each.share, B, 100 * each.spread, len(each.shares),
            )  # fmt: skip
    seconds, last = by_batch[-1].seconds, BATCHES[-1]
    copied = len(range(0, last, 2))
    tower_us = tuple(1e6 * each.seconds["tower"] for each in by_batch)
    return ProbeTime(
        tower_us=tower_us,
        block_us=tuple(1e6 * each.seconds["block"] for each in by_batch),
        probe_us=tuple(each.share * us for each, us in zip(by_batch, tower_us, strict=True)),
        copy_share=(seconds["copy"] / copied) / (seconds["block"] / last),
        spread=tuple(each.spread for each in by_batch),
        readings=tuple(len(each.shares) for each in by_batch),
        is_conclusive=all(each.is_conclusive for each in by_batch),
    )


def take_readings(calls: Mapping[str, Call], *, budget_s: float, clock: Clock) -> Readings:
    """Readings until AGREEING of them agree, MAX_READINGS at most.

    Args:
      calls: `tower`, `probed` (the tower with a probe), `probe` alone where it counts, and others.
      budget_s: for the first AGREEING readings; 2 rounds each at least.
      clock: seconds.
    """
    _round(calls, list(calls), clock)  # caches and allocations
    round_s = sum(_round(calls, list(calls), clock).values())
    rounds = max(2, min(50, int(budget_s / AGREEING / max(round_s, 1e-6))))
    smallest: dict[str, float] = dict.fromkeys(calls, math.inf)
    shares: list[float] = []
    while True:
        reading = _reading(calls, rounds, clock)
        smallest = {name: min(smallest[name], seconds) for name, seconds in reading.items()}
        shares.append(_share_of(reading))
        readings = Readings(smallest, tuple(shares))
        if readings.is_conclusive or len(shares) == MAX_READINGS:
            return readings


def _share_of(seconds: Mapping[str, float]) -> float:
    """What a probe adds to the tower, or takes alone, over the tower's time: the larger.

    No less than what a measurement can tell.
    """
    probe = max(seconds["probed"] - seconds["tower"], seconds.get("probe", 0.0))
    return max(probe / seconds["tower"], MIN_SPREAD)


def _reading(calls: Mapping[str, Call], rounds: int, clock: Clock) -> dict[str, float]:
    """Smallest seconds of each call over rounds that run all of them, in an order that rotates."""
    order = list(calls)
    smallest = dict.fromkeys(order, math.inf)
    for _ in range(rounds):
        for name, seconds in _round(calls, order, clock).items():
            smallest[name] = min(smallest[name], seconds)
        order.append(order.pop(0))
    return smallest


def _round(calls: Mapping[str, Call], order: list[str], clock: Clock) -> dict[str, float]:
    """Seconds of each call, run once."""
    seconds = {}
    for name in order:
        start = clock()
        calls[name]()
        seconds[name] = clock() - start
    return seconds


def calls_of(
    model: nn.Module, block: int, head: HeadWeights, classes: Tensor, logit_scale: float, B: int
) -> dict[str, Call]:
    """What `measure` times at batch B: tower, block, probed, copy, and where it counts probe."""
    tower = find_tower(model)
    device = device_of(tower)
    probe = Int8Head(head, torch.zeros(4)).to(device)
    contrast = contrasts(classes).to(device)
    run_block = blocks_of(tower)[block - 1]
    probed = _with_exit(tower, block, head, classes, logit_scale)
    spec, order = tower_spec(tower), block_specs(tower)[block - 1].call
    images = as_input(tower, _normal(0, B, 3, *spec.image_size))
    z = as_input(tower, _normal(1, B, spec.tokens, spec.width))
    z_block = order.by_image(z).contiguous()
    half = torch.arange(0, B, 2, device=device)

    def decide() -> list[bool]:
        tokens = probe_tokens(z, spec.prefix_tokens)
        return [s >= 0.5 for s in probe(tokens, contrast, logit_scale)[5].tolist()]

    calls: dict[str, Call] = {
        "tower": lambda: tower(images),
        "block": lambda: run_block(z_block),
        "probed": lambda: probed(images),
        "copy": lambda: z.index_select(0, half),
    }
    if not decides_on_device(tower, images):
        calls["probe"] = decide
    return {name: _finished(call, device) for name, call in calls.items()}


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_exit(
    tower: nn.Module, block: int, head: HeadWeights, classes: Tensor, logit_scale: float
) -> nn.Module:
    """The tower, all its parts shared, with an exit after this block that no image takes."""
    gate = Gate("learned", ((0.0,) * 4,), (math.inf,))
    router = Router((block,), [head], gate, classes=classes, logit_scale=logit_scale)
    probed = copy.copy(tower)
    probed._modules = dict(tower._modules)
    attach_exits(probed, router.to(device_of(tower)))
    return probed


def _finished(call: Call, device: torch.device) -> Call:
    """The call, over when its work is: a GPU works on while Python runs ahead."""
    if device.type != "cuda":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return run
