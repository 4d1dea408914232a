"""What the dose study runs: doses, seeds, and trainings short enough for fifty forms of a model."""

import math
from dataclasses import dataclass, replace

from lraee.study.dose.outliers import CHANNELS
from lraee.study.protocol import Protocol

DOSE_PROTOCOL = Protocol(frontier_budgets=(0.9, 0.8, 0.7), views=0, steps=500)
FAST_DOSES = replace(DOSE_PROTOCOL, steps=60, lens_steps=20, sweep_points=9)
"""Everything, with trainings too short for figures worth keeping."""
REDUCED_LEARN, REDUCED_REPORT = 6_000, 2_000
"""Photos of the reduced form: to learn from, and to report on."""


@dataclass(frozen=True)
class Doses:
    """What is run.

    Args:
      scales: the doses, ascending.
      seeds: each draws the channels, the splits and the heads.
      channels: of each norm that get the dose.
    """

    scales: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    channels: int = CHANNELS


def parse_doses(text: str) -> tuple[float, ...]:
    """Numbers with commas between, in ascending order, each once.

    Raises: ValueError on anything but finite numbers from 1 on.
    """
    try:
        doses = sorted({float(part) for part in text.split(",")})
    except ValueError:
        doses = []
    if not doses or not all(math.isfinite(dose) and dose >= 1.0 for dose in doses):
        raise ValueError(
            "report: dose must be finite numbers of at least 1 with commas between, as in 1,8,16,"
            f" got {text!r}"
        )
    return tuple(doses)
