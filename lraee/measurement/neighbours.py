"""Exact search: the rows of largest dot product with a query."""

import torch
from torch import Tensor

_CHUNK = 1024
"""Queries whose scores with all rows are held at once."""


def neighbours(
    queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None = None, *, chunk: int = _CHUNK
) -> Tensor:
    """The k rows of largest dot product with each query, best first: int64 [n, k].

    Of equal rows k = 1 takes the first.

    Args:
      queries: float [n, E].
      rows: float [N, E], N >= k, and N > k with `exclude`.
      k: neighbours of a query.
      exclude: int64 [n], a row that each query does not find, or None.
      chunk: queries scored at once.
    """
    parts = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ rows.T
        if exclude is not None:
            scores.scatter_(1, exclude[start : start + chunk, None], -torch.inf)
        parts.append(scores.argmax(1, keepdim=True) if k == 1 else scores.topk(k, dim=1).indices)
    return torch.cat(parts)


def other_neighbours(rows: Tensor, k: int, *, chunk: int = _CHUNK) -> Tensor:
    """The k other rows of largest dot product with each row, int64 [n, k]."""
    return neighbours(rows, rows, k, torch.arange(len(rows)), chunk=chunk)
