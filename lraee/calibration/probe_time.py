"""How long a probe and a copy of survivors take beside the tower, on this machine."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights, Int8Head, contrasts, probe_tokens
from lraee.exits.router import Router
from lraee.measurement.timing import interleaved
from lraee.model.trace import full_depth
from lraee.towers.families import block_specs, blocks_of, find_tower, tower_spec

BATCHES = (1, 32)
OVERHEAD = 0.02
"""Probes together may take this share of the full-depth tower's time: what a batch in which no
image leaves can lose."""


@dataclass(frozen=True)
class ProbeTime:
    """Times in microseconds, medians; one figure for each batch of BATCHES.

    Args:
      tower_us: a call at full depth.
      block_us: one block.
      probe_us: what one probe and the gate's decision add to a call.
      copy_share: copying one image's tokens over one block on it, in the larger batch.
    """

    tower_us: tuple[float, ...]
    block_us: tuple[float, ...]
    probe_us: tuple[float, ...]
    copy_share: float

    @property
    def probe_share(self) -> float:
        """Time of a probe over that of the tower, the worst of the batch sizes."""
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
) -> ProbeTime:
    """Times an accelerated model at full depth, without and with an exit that nobody takes.

    Inside the tower a probe finds its weights out of the cache and costs twice what it costs in a
    loop of its own, at batch 1, and on a GPU an exit is a wait for its answer too; the larger of
    both counts, as noise may hide the difference.

    Args:
      model: from lraee.accelerate.
      block: depth of the probe.
      head, classes, logit_scale: of the probe.
      budget_s: for each batch size.
    """
    tower = find_tower(model)
    like = next(tower.parameters())
    probe = Int8Head(head, torch.zeros(4)).to(like.device)
    contrast = contrasts(classes).to(like.device)
    run_block = blocks_of(tower)[block - 1]
    probed = _with_exit(tower, block, head, classes, logit_scale)
    spec, call = tower_spec(tower), block_specs(tower)[block - 1].call
    rows: dict[str, list[float]] = {"tower": [], "block": [], "probe": [], "copy": []}

    def decide(z: Tensor) -> list[bool]:
        tokens = probe_tokens(z, spec.prefix_tokens)
        return [s >= 0.5 for s in probe(tokens, contrast, logit_scale)[5].tolist()]

    for B in BATCHES:
        images = _normal(0, B, 3, *spec.image_size).to(like)
        z = _normal(1, B, spec.tokens, spec.width).to(like)
        z_block = call.by_image(z).contiguous()
        half = torch.arange(0, B, 2, device=like.device)
        calls: dict[str, Any] = {
            "tower": lambda images=images: tower(images),
            "block": lambda z=z_block: run_block(z),
            "probed": lambda images=images: probed(images),
            "probe": lambda z=z: decide(z),
            "copy": lambda z=z, half=half: z.index_select(0, half),
        }
        finished = {name: _finished(call, like.device) for name, call in calls.items()}
        with full_depth(model):
            seconds = interleaved(finished, budget_s=budget_s)
        pairs = zip(seconds.pop("probed"), seconds["tower"], strict=True)
        added = median(with_probe - without for with_probe, without in pairs)
        for name, each in seconds.items():
            us = 1e6 * median(each)
            rows[name].append(max(us, 1e6 * added) if name == "probe" else us)
    last = BATCHES[-1]
    copied = len(range(0, last, 2))
    copy_share = (rows["copy"][-1] / copied) / (rows["block"][-1] / last)
    return ProbeTime(tuple(rows["tower"]), tuple(rows["block"]), tuple(rows["probe"]), copy_share)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_exit(
    tower: nn.Module, block: int, head: HeadWeights, classes: Tensor, logit_scale: float
) -> nn.Module:
    """The tower, all its parts shared, with an exit after this block that nobody takes."""
    gate = Gate("learned", ((0.0,) * 4,), (math.inf,))
    router = Router((block,), [head], gate, classes=classes, logit_scale=logit_scale)
    router.prefix_tokens = tower_spec(tower).prefix_tokens
    probed = copy.copy(tower)
    probed._modules = {**tower._modules, "exits": router.to(next(tower.parameters()).device)}
    return probed


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, over when its work is: a GPU works on while Python runs ahead."""
    if device.type != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run
