"""Time of an image tower, variants side by side in one process: only such ratios count.

Protocol: all variants run in turn until WARM_S have passed; then rounds, each of which runs every
variant once, in an order that rotates. A time is the median, with the 20th and 80th percentile; a
ratio is the median of the ratios of each round, so that a machine that slows down for a while
slows both sides of it.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

SCHEMA = "lraee.bench/1"
WARM_S = 0.3
MIN_ROUNDS, MAX_ROUNDS = 5, 300


class ImageEncoder(Protocol):
    """The half of CLIP that lraee makes faster."""

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Photos [B, 3, H, W] -> embeddings [B, E]."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one variant: median and the percentiles that hold the middle 60 %."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Return the summary of all rounds."""
        ms = [1e3 * s for s in seconds]
        fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
        return cls(statistics.median(ms), fifths[0], fifths[3])


@dataclass(frozen=True)
class TowerTiming:
    """One variant at one batch size; `speedup` > 1: faster than the first variant."""

    variant: str
    batch: int
    timing: Timing
    images_per_s: float
    speedup: float


def warm_up(
    runs: Sequence[Callable[[], object]], budget_s: float, warm_s: float, *, least: int, most: int
) -> int:
    """Run all in turn until warm_s have passed; return how many such rounds fill budget_s."""
    start, count, round_s = time.perf_counter(), 0, 0.0
    while count < 2 or time.perf_counter() - start < warm_s:
        round_start = time.perf_counter()
        for run in runs:
            run()
        round_s, count = time.perf_counter() - round_start, count + 1
    return max(least, min(most, int(budget_s / max(round_s, 1e-6))))


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, budget_s: float = 5.0, warm_s: float = WARM_S
) -> dict[str, list[float]]:
    """Seconds of every round of each variant; round i of all variants ran back to back."""
    least, most = MIN_ROUNDS, MAX_ROUNDS
    rounds = warm_up(list(variants.values()), budget_s, warm_s, least=least, most=most)
    return timed_rounds(variants, rounds)


def timed_rounds(
    variants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each variant in so many rounds, their order rotating; nothing is warmed up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
        order.append(order.pop(0))
    return seconds


def time_tower(
    models: Mapping[str, nn.Module],
    image_size: tuple[int, int],
    batches: Sequence[int],
    budget_s: float = 10.0,
    *,
    as_input: Callable[[nn.Module, Tensor], Tensor],
) -> list[TowerTiming]:
    """Time `encode_image` of several forms of one model, interleaved, for each batch size.

    Args:
      models: variant name -> model; the first is what the others are compared with.
      image_size: height and width of a photo, in pixels.
      batches: photos per call.
      budget_s: wall time per batch size, warm-up and at least MIN_ROUNDS rounds aside.
      as_input: brings photos to a model's device and type; no single parameter tells the type,
        norms may have another one.
    """
    rows: list[TowerTiming] = []
    for batch in batches:
        torch.manual_seed(0)
        photos = torch.randn(batch, 3, *image_size)
        calls = {name: _call(model, as_input(model, photos)) for name, model in models.items()}
        seconds = interleaved(calls, budget_s=budget_s)
        first = seconds[next(iter(models))]
        for name, each in seconds.items():
            timing = Timing.of(each)
            speedup = statistics.median(f / e for f, e in zip(first, each, strict=True))
            rows.append(TowerTiming(name, batch, timing, 1e3 * batch / timing.median_ms, speedup))
    return rows


def float_and_bfloat16(model: nn.Module) -> dict[str, nn.Module]:
    """The two forms that a torch user runs today; the bfloat16 one is a copy."""
    return {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}


def _call(model: nn.Module, photos: Tensor) -> Callable[[], object]:
    encoder = cast(ImageEncoder, model)

    def run() -> None:
        with torch.inference_mode():
            encoder.encode_image(photos)
            if photos.is_cuda:
                torch.cuda.synchronize(photos.device)

    return run
