"""A whole image tower in int8 beside torch's float16 on this GPU, both as CUDA graphs."""

import copy
import math
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from lraee.diagnostics.selftest_sizes import Target
from lraee.diagnostics.tuning import Rounds
from lraee.measurement.float16 import TowerTime
from lraee.model.accelerate import accelerate
from lraee.towers.families import image_size


@torch.inference_mode()
def time_tower(
    tower: nn.Module,
    target: Target,
    rounds: Rounds,
    batches: tuple[int, ...],
    *,
    budget_s: float = math.inf,
) -> Iterator[TowerTime]:
    """One row a batch while the budget lasts.

    Args:
      tower: float image tower, on any device; it stays as it is.
      target: where to run. In the interpreter's place (the CPU) both run in float32.
      rounds: times calls in turn.
      batches: images of a call.
      budget_s: no batch is begun after so many seconds.
    """
    end = time.monotonic() + budget_s
    dtype = torch.float16 if target.device.type == "cuda" else torch.float32
    base: Any = copy.deepcopy(tower).to(target.device, dtype).eval()
    fast: Any = accelerate(base)
    if hasattr(fast, "cuda_graphs"):
        fast.cuda_graphs = False  # the whole call is captured
    for batch in batches:
        if time.monotonic() > end:
            return
        images = torch.randn(batch, 3, *image_size(base), device=target.device).to(dtype)
        calls = {"int8": partial(fast, images), "float16": partial(base, images)}
        ms = {name: 1e3 * median(each) for name, each in rounds(calls).items()}
        yield TowerTime(batch, ms["int8"], ms["float16"])
