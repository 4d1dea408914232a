"""Image search in an index of photos: does each form of a model still find what it should?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.evaluation.evaluate import FLOAT, Embedded
from lraee.measurement.neighbours import other_neighbours

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """Search of one form in its own index, every photo a query for all others; percent.

    With early exits the photos of the index, and the queries, left the tower at mixed depths.

    Args:
      scheme: the form of the model.
      recall_1, recall_5, recall_10: queries for which the photo that float finds first is among
        the k first.
      class_1, class_5, class_10: queries for which a photo of their own class is; None where no
        photo has a label.
    """

    scheme: str
    recall_1: float
    recall_5: float
    recall_10: float
    class_1: float | None
    class_5: float | None
    class_10: float | None


def search_all(embedded: Embedded) -> list[Retrieval]:
    """One row per form, the one named "float" first; needs more than 10 photos.

    Raises: ValueError on fewer.
    """
    n = len(embedded.labels)
    if n <= DEPTHS[-1]:
        raise ValueError(f"retrieval: photos must be more than {DEPTHS[-1]}, got {n}")
    wanted = other_neighbours(embedded.embeddings[FLOAT].nan_to_num(0.0, 0.0, 0.0), 1)
    labels = torch.tensor([-1 if label is None else label for label in embedded.labels])
    known = labels >= 0
    rows = []
    for form, embeddings in embedded.embeddings.items():
        finite = embeddings.isfinite().all(dim=1)
        ranked = other_neighbours(embeddings.nan_to_num(0.0, 0.0, 0.0), DEPTHS[-1])
        is_wanted = (ranked == wanted) & finite[:, None]
        is_own_class = (labels[ranked] == labels[:, None]) & finite[:, None]
        by_class = [_percent(is_own_class[known, :k]) if known.any() else None for k in DEPTHS]
        rows.append(Retrieval(form, *(_percent(is_wanted[:, :k]) for k in DEPTHS), *by_class))
    return rows


def _percent(hits: Tensor) -> float:
    return 100 * hits.any(dim=1).float().mean().item()
