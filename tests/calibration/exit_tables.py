"""Random exit tables: small, seeded, with a known rule behind them."""

from collections.abc import Sequence

import numpy as np
import torch

from lraee.calibration.risk import signed_loss
from lraee.calibration.scoring import Costs, ExitTable
from tests.support import generator

FULL = 100.0


def make_table(
    n: int, m: int, seed: int, *, E: int = 6, is_signed: bool = False, nan_rows: int = 0
) -> ExitTable:
    """Deeper exits are right more often, and surer where they are right; full depth is right most.

    An exit agrees with full depth where both are right or both wrong of the same class.
    """
    source = generator(seed)
    hardness = torch.rand(n, 1, generator=source)
    skill = torch.linspace(0.5, 0.95, m + 1)
    noise = torch.rand(n, m + 1, generator=source)
    right = hardness * 0.7 + noise * 0.3 < skill
    confidence = 0.5 + 0.3 * (skill - hardness) + 0.15 * torch.randn(n, m + 1, generator=source)
    confidence = confidence[:, :m].clamp(0.01, 0.99)
    margin = confidence * torch.rand(n, m, generator=source)
    variance = 50 + 20 * hardness + 5 * torch.randn(n, m, generator=source)
    features = torch.stack([confidence, margin, variance], dim=2)
    direction = torch.randn(n, 1, E, generator=source)
    drift = torch.randn(n, m, E, generator=source) * (1.2 - skill[:m, None]) * 2
    answers = torch.where(right, 0, torch.randint(1, 4, (n, m + 1), generator=source))
    embedding = direction + drift
    for row in range(nan_rows):
        embedding[row], features[row], answers[row, :m], right[row, :m] = (
            torch.nan,
            torch.nan,
            0,
            False,
        )
    gain = right.double().numpy()
    if is_signed:
        loss = signed_loss(gain[:, -1:] - gain)
    else:
        loss = (answers != answers[:, -1:]).double().numpy()
        gain = 1.0 - loss
    return ExitTable(
        embedding, answers[:, :m], features, right[:, :m], gain, loss, is_signed=is_signed
    )


def make_costs(m: int, *, probe: float = 1.0) -> Costs:
    """Blocks of equal cost up to FULL, and a probe at each exit that stands."""

    def when_leaving(subset: Sequence[int]) -> list[int]:
        depths = [round(FULL * (e + 1) / (m + 1)) for e in subset]
        probes = [round(probe * (place + 1)) for place in range(len(subset))]
        left = [depth + paid for depth, paid in zip(depths, probes, strict=True)]
        return [*left, round(FULL + probe * len(subset))]

    return Costs(when_leaving, int(FULL))


def rows_of(table: ExitTable, rows: np.ndarray) -> ExitTable:
    """The images of these rows."""
    index = torch.from_numpy(rows)
    return ExitTable(
        table.embedding[index], table.top1[index], table.features[index],
        table.is_correct[index], table.gain[rows], table.loss[rows], table.is_signed,
    )  # fmt: skip
