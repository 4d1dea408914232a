"""Time that exits save, in batches of mixed photos, full depth and exits taking turns."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lraee.exits.plan import Plan
from lraee.measurement.timing import interleaved
from lraee.model.accelerate import accelerate
from lraee.study.trials import Trial

BATCH = 32
_BATCHES = 4


def time_saved(trial: Trial, plan: Plan, images: Tensor, *, budget_s: float) -> float:
    """Percent of the full-depth time that a plan saves on batches of 32, median of the rounds.

    Args:
      trial, plan: what to run.
      images: the tower's size, float32 [n, 3, H, W], a mix of classes, n >= 32.
      budget_s: seconds to spend.
    """
    clip, scheme = trial.backbone.learn.teacher, trial.backbone.acceleration.scheme
    full = accelerate(clip, scheme=scheme)
    fast = accelerate(clip, scheme=scheme, exits=trial.exits(plan))
    batches = torch.split(images[: BATCH * _BATCHES], BATCH)
    seconds = interleaved(
        {"full": _runs(full, batches), "exits": _runs(fast, batches)}, budget_s=budget_s
    )
    ratios = [e / f for e, f in zip(seconds["exits"], seconds["full"], strict=True)]
    return 100.0 * (1.0 - statistics.median(ratios))


def _runs(model: nn.Module, batches: tuple[Tensor, ...]) -> Callable[[], None]:
    encode = model.get_submodule("visual")

    def run() -> None:
        with torch.inference_mode():
            for images in batches:
                encode(images)

    return run
