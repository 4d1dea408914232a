"""What quantization costs on real photos: labels, ranking, direction, time, beside float."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from lraee.data.names import reason_counts
from lraee.data.photos import Photos
from lraee.data.sources import DataError
from lraee.evaluation.peers import Peer
from lraee.measurement import intervals, machine
from lraee.measurement.intervals import Interval
from lraee.measurement.neighbours import other_neighbours
from lraee.model.trace import ExitStats, Trace, has_exits, trace
from lraee.towers.families import encode

SCHEMA = "lraee.evaluate/3"
FLOAT = "float"


@dataclass(frozen=True)
class Row:
    """One form of the model over all photos; shares are in percent.

    Args:
      scheme: "float", the quantization scheme, or "exits" and the kind of gate; with "text int8"
        where the class texts are those of an int8 text tower.
      top1: zero-shot answers that are the label; None without labels, as top5.
      agreement: zero-shot answers equal to float's; None without class texts.
      error: mean of |y - f| / |f - mean f| over photos, unit embeddings y of this form and f of
        float.
      neighbours: photos whose nearest other photo by cosine is float's; None below 3 photos.
      neighbours_95: its 95 % interval.
      neighbours_10: of float's ten nearest photos those that are among this form's ten; None below
        12 photos.
      neighbours_10_95: its 95 % interval.
      cosine_mean: of the embedding with float's, and its 1st percentile over photos.
      time_ms: per photo, median over batches, all forms taking turns on each batch.
      weight_bytes: of the image tower.
      flops_saved: of the tower's FLOPs, heads and probes charged; None without exits.
      not_finite: photos whose embedding holds NaN or infinity; they agree with nothing.
    """

    scheme: str
    top1: float | None
    top5: float | None
    agreement: float | None
    error: float
    neighbours: float | None
    neighbours_95: Interval | None
    neighbours_10: float | None
    neighbours_10_95: Interval | None
    cosine_mean: float
    cosine_p01: float
    time_ms: float
    weight_bytes: int
    flops_saved: float | None
    not_finite: int


@dataclass
class Embedded:
    """Unit embeddings float32 [n, E] of the same photos by each form of a model.

    Of forms with early exits also where photos left: `exits`, and per photo `exit_blocks`.
    """

    embeddings: dict[str, Tensor]
    seconds_per_photo: dict[str, list[float]]
    labels: list[int | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    exits: dict[str, ExitStats] = field(default_factory=dict)
    exit_blocks: dict[str, list[int]] = field(default_factory=dict)

    def note_exits(self, name: str, t: Trace) -> None:
        """Adds what one call of this form did."""
        self.exits[name] = self.exits[name] + t.stats if name in self.exits else t.stats
        self.exit_blocks.setdefault(name, []).extend(t.exit_block.tolist())


@torch.inference_mode()
def embed(
    models: Mapping[str, nn.Module],
    photos: Photos,
    preprocess: Callable[[Image], Tensor],
    *,
    batch: int = 32,
    progress: bool = True,
) -> Embedded:
    """Embed every photo by every model, in one pass over the files.

    Each batch is decoded once and goes through all models back to back, in rotating order.
    Raises: DataError when no photo could be used.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    result = Embedded({}, {name: [] for name in models})
    order = list(models)
    with_exits = {name for name, model in models.items() if has_exits(model)}
    for each in photos.batches(preprocess, size=batch, progress=progress, description="embed"):
        if not result.names:
            for name in order:  # Warm up: the first call allocates and packs
                encode(models[name], each.images)
        for name in order:
            with trace(models[name]) if name in with_exits else nullcontext() as t:
                start = time.perf_counter()
                part = F.normalize(encode(models[name], each.images), dim=-1)
                seconds = time.perf_counter() - start
            if t is not None:
                result.note_exits(name, t)
            parts[name].append(part)
            result.seconds_per_photo[name].append(seconds / len(each.names))
        order.append(order.pop(0))
        result.labels += each.labels
        result.names += each.names
    if not result.names:
        raise DataError(
            f"data: photos must hold one that can be read, got none ({photos.report()})"
        )
    result.embeddings = {name: torch.cat(each) for name, each in parts.items()}
    return result


def compare(
    embedded: Embedded,
    models: Mapping[str, nn.Module],
    class_rows: Tensor | None,
    texts: Mapping[str, tuple[str, Tensor]] | None = None,
) -> list[Row]:
    """One row per model, each against the one named "float" with `class_rows`.

    Args:
      embedded: photos, by all models.
      models: name -> model.
      class_rows: unit text features float32 [K, E], or None.
      texts: more rows: name -> name of a model and the class texts that its photos meet, [K, E].
    """
    forms = {name: (name, class_rows) for name in models} | dict(texts or {})
    base = embedded.embeddings[FLOAT]
    base_top = None if class_rows is None else (base @ class_rows.T).argmax(dim=1)
    spread = (base - base.mean(dim=0)).norm(dim=1).clamp(min=1e-12)
    known = [i for i, label in enumerate(embedded.labels) if label is not None]
    labels = torch.tensor([embedded.labels[i] for i in known], dtype=torch.int64)
    rows = []
    for title, (name, text_rows) in forms.items():
        rows_of = embedded.embeddings[name]
        finite = rows_of.isfinite().all(dim=1)
        y = rows_of.nan_to_num(0.0, 0.0, 0.0)
        top1 = top5 = agreement = None
        if text_rows is not None and base_top is not None:
            ranked = (y @ text_rows.T).topk(min(5, len(text_rows)), dim=1).indices
            agreement = _percent((ranked[:, 0] == base_top) & finite)
            if known:
                right = (ranked[known] == labels[:, None]) & finite[known, None]
                top1, top5 = _percent(right[:, 0]), _percent(right.any(dim=1))
        cosine = (y * base).sum(dim=1)
        rows.append(
            Row(
                title,
                top1,
                top5,
                agreement,
                float(((y - base).norm(dim=1) / spread).mean()),
                *_nearest(y, base, finite),
                cosine.mean().item(),
                cosine.quantile(0.01).item() if len(cosine) < 1 << 24 else cosine.min().item(),
                1e3 * statistics.median(embedded.seconds_per_photo[name]),
                tower_bytes(models[name]),
                100 * embedded.exits[name].flops_saved if name in embedded.exits else None,
                int((~finite).sum()),
            )
        )
    return rows


def _nearest(
    y: Tensor, base: Tensor, finite: Tensor
) -> tuple[float | None, Interval | None, float | None, Interval | None]:
    """Shares of the nearest and of the ten nearest photos that are float's, each with interval."""
    n = len(base)
    if n < 3:
        return None, None, None, None
    same = (other_neighbours(y, 1) == other_neighbours(base, 1))[:, 0] & finite
    first = _percent(same), _in_percent(intervals.of_share(int(same.sum()), n))
    if n < 12:
        return *first, None, None
    both = other_neighbours(y, 10)[:, :, None] == other_neighbours(base, 10)[:, None]
    shared = both.any(dim=2).float().mean(dim=1) * finite
    return *first, 100 * float(shared.mean()), _in_percent(intervals.of_mean_share(shared))


def _in_percent(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]


def tower_bytes(model: nn.Module) -> int:
    """Bytes of the image tower's parameters and buffers, shared memory counted once; of a peer
    what it says.
    """
    if isinstance(model, Peer):
        return model.weight_bytes
    tower = cast(nn.Module, model.visual)
    storages = [t.untyped_storage() for t in (*tower.parameters(), *tower.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def report(
    rows: list[Row], photos: Photos, embedded: Embedded, *, model: str, data: str, **settings: Any
) -> dict[str, Any]:
    """Return what `lraee evaluate` writes as JSON."""
    return {
        "schema": SCHEMA,
        **machine.describe(),
        "model": model,
        "data": data,
        "photos": len(embedded.names),
        "labelled": sum(label is not None for label in embedded.labels),
        "skipped": len(photos.skipped),
        "skipped_reasons": reason_counts(row.reason for row in photos.skipped),
        "skipped_first": [asdict(row) for row in photos.skipped[:10]],
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "exits": {name: asdict(stats) for name, stats in embedded.exits.items()},
    }


def _percent(hits: Tensor) -> float:
    return 100 * hits.float().mean().item()
