"""Nearest rows by inner product: exact up to 100,000, beyond that faiss with exact scores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT_UP_TO = 100_000
_CANDIDATES = 8
_BLOCK = 65_536

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Hits:
    """The best rows, best first, with their inner products."""

    rows: NDArray[np.int64]
    scores: Rows


class Exact:
    """All inner products of a query, in numpy; rows that are not finite are never returned."""

    name = "exact"

    def __init__(self, rows: Rows) -> None:
        """Unit rows float32 [N, E]."""
        self._rows = rows
        self._bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))

    def search(self, query: Rows, k: int) -> Hits:
        """The k best of N for a query [E]."""
        scores = self._rows @ query
        scores[self._bad] = -np.inf
        return _best(np.arange(len(scores)), scores, min(k, len(scores) - len(self._bad)))


class Quantized:
    """faiss on 8-bit rows finds 8 k candidates (at least 64), whose exact scores decide.

    A scan of all rows: its recall does not depend on how they cluster, as a graph's does.

    Raises: ImportError, one line, without faiss.
    """

    name = "faiss SQ8"

    def __init__(self, rows: Rows) -> None:
        """Unit rows float32 [N, E]."""
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                f"search: {len(rows)} photos need faiss, which is not installed: "
                "pip install 'lraee[search]'"
            ) from error
        self._rows = rows
        self._keep = np.flatnonzero(np.isfinite(rows).all(axis=1))
        kind = faiss.ScalarQuantizer.QT_8bit
        self._index: Any = faiss.IndexScalarQuantizer(
            rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT
        )
        if not len(self._keep):
            return
        good = rows if len(self._keep) == len(rows) else rows[self._keep]
        self._index.train(good[:: max(1, len(good) // _BLOCK)])
        for start in range(0, len(good), _BLOCK):
            self._index.add(good[start : start + _BLOCK])

    def search(self, query: Rows, k: int) -> Hits:
        """The k best of N for a query [E]."""
        if (k := min(k, len(self._keep))) <= 0:
            return _best(self._keep, self._rows[self._keep] @ query, 0)
        wanted = min(max(64, _CANDIDATES * k), len(self._keep))
        _, places = self._index.search(query[None], wanted)
        rows = self._keep[places[0][places[0] >= 0]]
        return _best(rows, self._rows[rows] @ query, min(k, len(rows)))


def make_index(rows: Rows, *, exact_up_to: int = EXACT_UP_TO) -> "Exact | Quantized":
    """Exact or, for more rows than that, Quantized."""
    return Exact(rows) if len(rows) <= exact_up_to else Quantized(rows)


def recall(index: "Exact | Quantized", rows: Rows, *, k: int = 10, queries: int = 200) -> float:
    """Share of the k exact nearest rows that the index finds, for rows spread evenly."""
    exact, N = Exact(rows), len(rows)
    hits = total = 0
    for row in np.linspace(0, max(N - 1, 0), min(queries, N), dtype=np.int64):
        if not np.isfinite(rows[row]).all():
            continue
        right = set(exact.search(rows[row], k).rows.tolist())
        hits += len(right & set(index.search(rows[row], k).rows.tolist()))
        total += len(right)
    return hits / max(total, 1)


def _best(rows: NDArray[np.int64], scores: Rows, k: int) -> Hits:
    """The k best, equal scores in the order of their rows."""
    if k <= 0:
        return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
    part = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
    order = part[np.lexsort((rows[part], -scores[part]))][:k]
    return Hits(rows[order], scores[order])
