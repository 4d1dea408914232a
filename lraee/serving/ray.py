"""Embedding on the machines of a Ray cluster, for more photos than one machine should take.

The driver lists and writes; actors of Ray Data read, decode and encode. All machines must see the
photos under the same path and have the same lraee. Parts, failures and resuming are those of
`lraee embed`, with the same bits; rows of parts that fit no longer are embedded again.

Ray listens on all interfaces unless told otherwise: `ray start --node-ip-address` binds it to one.
It takes 127.0.0.1 for the machine's outer address; 127.0.0.2 keeps it on the loopback.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lraee.data.names import from_stored, to_stored
from lraee.data.sources import DataError, Limits, Skipped
from lraee.serving.account import Totals, account
from lraee.serving.embed import Prepared, prepare, row_of, split
from lraee.serving.embed_model import Choice, PhotoModel
from lraee.serving.listing import Candidate, open_listing
from lraee.serving.output import Finished, Output
from lraee.serving.parts import Part, PartHeader, Provenance, Row, Settings, write_part
from lraee.serving.pool import ordered

Columns = Mapping[str, np.ndarray]
_NO_EXIT = -1


@dataclass(frozen=True)
class Job:
    """What each machine needs to know.

    `cpus`: of one actor, its threads for decoding and for the tower; `folder`: what relative paths
    of `photos` and of a list begin at.
    """

    photos: tuple[str, ...]
    choice: Choice
    reading: Limits
    settings: Settings
    batch: int = 32
    cpus: int = 1
    folder: str = field(default_factory=os.getcwd)


def run(
    job: Job,
    output: Output,
    *,
    address: str,
    actors: int = 1,
    part_rows: int = 1024,
) -> Totals:
    """Embed all photos on a Ray cluster that is running.

    Args:
      job: what to embed, by which model.
      output: entered; on the driver's machine.
      address: of the cluster, HOST:PORT or "auto".
      actors: processes that embed, each with a model of its own.
      part_rows: candidates per part.
    Raises: DataError, one line, as `lraee embed`; ImportError without Ray.
    """
    with _connection(address) as ray:
        return _run(ray, job, output, actors, part_rows)


def _run(ray: Any, job: Job, output: Output, actors: int, part_rows: int) -> Totals:
    listing = open_listing(job.photos, job.reading)
    provenance = Provenance({**job.settings, "shard": None}, listing.photos_from)
    finished = Finished(output, provenance)
    with account(output, finished, provenance, may_be_empty=False) as counts:
        parts = list(split(listing, part_rows))
        kept = {part.index: header for part in parts if (header := _kept(part, finished))}
        missing = {part.index: part for part in parts if part.index not in kept}
        written = {}
        if missing:
            rows = ray.data.from_arrow(_table(missing.values())).map_batches(
                _Embedder, fn_constructor_args=(job,), batch_size=8 * job.batch,
                batch_format="numpy", concurrency=actors, num_cpus=job.cpus, zero_copy_batch=True,
            )  # fmt: skip
            written = dict(_write(rows, missing, output, provenance))
        for part in parts:
            header = kept.get(part.index) or written[part.index]
            counts.add(part, header, resumed=header.rows if part.index in kept else 0)
    return counts.totals


@contextmanager
def _connection(address: str) -> Iterator[Any]:
    """Ray's module, connected; a connection that was there before stays.

    What Ray prints, such as the end of a node, goes to stderr: results go to stdout.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "embed: --ray needs Ray, which is not installed: pip install 'lraee[ray]'"
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_new = not ray.is_initialized()
    with redirect_stdout(sys.stderr):
        try:
            if is_new:
                ray.init(address=address, log_to_driver=False, **_loopback(address))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(
                f"embed: --ray must be a cluster that runs, got {address}; ray start --head"
            ) from error
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield ray
        finally:
            if is_new:
                ray.shutdown()


def _loopback(address: str) -> dict[str, str]:
    """Of a cluster that is bound to an address of the loopback: the driver's own is the same."""
    host = address.rpartition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") else {}


def _kept(part: Part, finished: Finished) -> PartHeader | None:
    return finished.keep(part) if part.candidates else PartHeader("", 0)


def _table(parts: Any) -> list[Any]:
    """One Arrow table per part: a row per candidate, with its part and its place there."""
    import pyarrow as pa

    return [
        pa.table(
            {
                "part": pa.array([part.index] * len(part.candidates), pa.int64()),
                "slot": pa.array(range(len(part.candidates)), pa.int64()),
                "name": [to_stored(each.name) for each in part.candidates],
                "size": pa.array([each.size for each in part.candidates], pa.int64()),
                "tar": [each.place[0] if each.place else "" for each in part.candidates],
                "offset": pa.array(
                    [each.place[1] if each.place else 0 for each in part.candidates], pa.int64()
                ),
            }
        )
        for part in parts
    ]


class _Embedder:
    """One actor: batches of candidates to embeddings, or the reasons why there are none."""

    def __init__(self, job: Job) -> None:
        os.chdir(job.folder)
        torch.set_num_threads(job.cpus)
        self._job, self._model = job, PhotoModel(job.choice)
        self._listing = open_listing(job.photos, job.reading)
        if self._model.settings != job.settings:
            raise DataError("embed: all machines must have the model and lraee of the driver")

    def __call__(self, rows: Columns) -> dict[str, Any]:
        candidates = [_candidate(rows, i) for i in range(len(rows["part"]))]
        prepared = ordered(
            candidates, lambda each: prepare(self._listing, self._model, each),
            workers=self._job.cpus, window=2 * max(self._job.batch, self._job.cpus),
        )  # fmt: skip
        count, width = len(candidates), self._job.settings["dimensions"]
        out: dict[str, Any] = {
            "part": rows["part"],
            "slot": rows["slot"],
            "embedding": np.zeros((count, width), np.float32),
            "width": np.zeros(count, np.int32),
            "height": np.zeros(count, np.int32),
            "exit_block": np.full(count, _NO_EXIT, np.int16),
            "reason": np.full(count, "", object),
        }
        waiting: list[tuple[int, Prepared]] = []
        for i, each in enumerate(prepared):
            if isinstance(each, Skipped):
                out["reason"][i] = each.reason
            else:
                waiting.append((i, each))
            if len(waiting) == self._job.batch:
                self._encode(waiting, out)
                waiting = []
        self._encode(waiting, out)
        return out

    def _encode(self, waiting: Sequence[tuple[int, Prepared]], out: dict[str, Any]) -> None:
        if not waiting:
            return
        embeddings, blocks = self._model.encode([each for _, each in waiting])
        for (i, each), embedding, block in zip(waiting, embeddings, blocks, strict=True):
            out["embedding"][i] = embedding
            out["width"][i], out["height"][i] = each.width, each.height
            out["exit_block"][i] = _NO_EXIT if block is None else block


def _candidate(rows: Columns, i: int) -> Candidate:
    tar = str(rows["tar"][i])
    place = (tar, int(rows["offset"][i])) if tar else None
    return Candidate(from_stored(str(rows["name"][i])), int(rows["size"][i]), 0, place)


def _write(
    rows: Any, missing: Mapping[int, Part], output: Output, provenance: Provenance
) -> Iterator[tuple[int, PartHeader]]:
    """Each part as soon as all its candidates are there; a row that comes again changes nothing."""
    open_parts: dict[int, dict[int, Row | Skipped]] = {}
    for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
        for i, index in enumerate(batch["part"].tolist()):
            part = missing[index]
            results = open_parts.setdefault(index, {})
            results[int(batch["slot"][i])] = _result(batch, i, part)
            if len(results) == len(part.candidates):
                yield index, _write_one(part, open_parts.pop(index), output, provenance)


def _result(batch: Columns, i: int, part: Part) -> Row | Skipped:
    candidate = part.candidates[int(batch["slot"][i])]
    if reason := str(batch["reason"][i]):
        return Skipped(candidate.name, reason)
    prepared = Prepared(None, int(batch["width"][i]), int(batch["height"][i]))
    block = int(batch["exit_block"][i])
    return row_of(candidate, prepared, batch["embedding"][i], None if block < 0 else block)


def _write_one(
    part: Part, results: Mapping[int, Row | Skipped], output: Output, provenance: Provenance
) -> PartHeader:
    in_order = [results[slot] for slot in range(len(part.candidates))]
    rows = [result for result in in_order if isinstance(result, Row)]
    failures = [result for result in in_order if isinstance(result, Skipped)]
    return write_part(output.part(part.index), part, rows, failures, provenance)
