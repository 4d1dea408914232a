"""Definition of one exit's decision."""

import torch
from torch import Tensor


def exit_decide(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which rows exit, and which row stands where after it.

    exits = rows with score >= threshold, ascending; a score of NaN never exits.
    survivors[i] = i where row i stays; otherwise, for i below the number that stays, the last row
    that stays and has not been taken: few rows move, and none to where a moved one came from.

    Args:
      scores: float32 [R], of the images that are in the tower.
      threshold: of the exit.
    Returns: exits int64 [X], survivors int64 [R - X].
    """
    rows = torch.arange(len(scores), device=scores.device)
    exiting = scores >= threshold
    remaining = rows[~exiting]
    survivors = rows[: len(remaining)].clone()
    survivors[exiting[: len(remaining)]] = remaining[remaining >= len(remaining)].flip(0)
    return rows[exiting], survivors
