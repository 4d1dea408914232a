"""Answers of images at each exit: a class, or without classes the image that a search finds."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.calibration.risk import signed_loss
from lraee.calibration.scoring import ExitTable
from lraee.exits.gate import unit
from lraee.measurement.neighbours import neighbours


@dataclass(frozen=True)
class Index:
    """Images to search in.

    Args:
      embeddings: from Pair.embeddings, [N, E] each, all finite.
      places: int64 [n], the row of each searching image, which does not find itself; None where
        those that search are not in it.
    """

    embeddings: Mapping[str, Tensor]
    places: Tensor | None = None

    def search(self, queries: Tensor, form: str) -> Tensor:
        """Row of the nearest other image by cosine, int64 [n], for queries [n, E]."""
        return nearest(queries, self.embeddings[form], self.places)


def judge(
    probes: Mapping[str, Tensor],
    embeddings: Mapping[str, Tensor],
    *,
    classes: Tensor | None,
    labels: Tensor | None,
    index: Index | None = None,
    is_proof: bool = False,
) -> ExitTable:
    """Which probes were right, by the labels or else by the float model's answer.

    Without classes an answer is a search: the nearest other image of an index in int8 at full
    depth; the right one is what the float model finds among its own embeddings.

    Args:
      probes: from Pair.probed.
      embeddings: from Pair.embeddings, of the same images.
      index: what a search without classes may find; None takes these images.
      classes: unit rows [K, E], or None.
      labels: int64 [n], all known, or None.
      is_proof: gain is what the loss counts: the answer is that of int8 at full depth.
    """
    teacher, full = embeddings["teacher"], embeddings["full"]
    if classes is not None:
        answers = torch.cat([probes["top1"], nearest(full, classes)[:, None]], dim=1)
        truth = nearest(teacher, classes) if labels is None else labels
    else:
        index = index or Index(embeddings, torch.arange(len(full)))
        columns = [*probes["embedding"].unbind(1), full]
        answers = torch.stack([index.search(each, "full") for each in columns], dim=1)
        truth = index.search(teacher, "teacher")
    right, same = answers == truth[:, None], answers == answers[:, -1:]
    if labels is None:
        gain, loss = (same if is_proof else right).double(), (~same).double()
    else:
        gain = right.double()
        loss = torch.from_numpy(signed_loss((gain[:, -1:] - gain).numpy()))
    return ExitTable(
        probes["embedding"], probes["top1"], probes["features"], right[:, :-1],
        gain.numpy(), loss.numpy(), is_signed=labels is not None,
    )  # fmt: skip


def nearest(queries: Tensor, rows: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Index of the row of largest cosine, int64 [n]; never the row of `exclude`, int64 [n]."""
    return neighbours(unit(queries.float()), unit(rows.float()), 1, exclude)[:, 0]
