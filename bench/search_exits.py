"""What a search finds when images leave early, by how they leave and after which block.

    python -m bench.search_exits TRAIN.zip REPORT.zip

Projections and heads are fitted on photos of TRAIN without labels; REPORT is looked at once, every
photo searching all others. Queries and index leave alike, but in the rows `half at full depth`,
where every second photo runs to the end, and `index at full depth`, where all of the index does.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

from lraee import accelerate
from lraee.calibration.collect import Pair
from lraee.calibration.head_training import BEST_HEAD, train_head
from lraee.calibration.search import FIT_IMAGES, choose_candidates, continued, fit, heads_of
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.exits.class_token import ClassTokenWeights, in_proj_of
from lraee.exits.gate import unit
from lraee.layers.int8_block import Int8Block
from lraee.measurement import machine
from lraee.measurement.intervals import of_share
from lraee.measurement.neighbours import neighbours
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, find_tower, tower_spec
from lraee.towers.flops import PartFlops
from lraee.zoo.opening import open_model


@dataclass(frozen=True)
class Row:
    """One way to leave after one block; shares of photos, in percent.

    Args:
      flops_saved: of the tower's at full depth, what follows the exit charged.
      as_float, float_among_5: float's nearest photo is the first, is among the first five.
      as_full, full_among_5: the same of int8 at full depth.
      interval: of as_full, at 95 %.
    """

    way: str
    block: int
    flops_saved: float
    as_float: float
    float_among_5: float
    as_full: float
    full_among_5: float
    interval: tuple[float, float]


def row(
    way: str, block: int, saved: float, queries: Tensor, index: Tensor, wanted: Sequence[Tensor]
) -> Row:
    """Searches of all queries [n, E] in an index [n, E]; wanted: what float and full depth find."""
    n = len(queries)
    ranked = neighbours(unit(queries.float()), unit(index.float()), 5, torch.arange(n))
    as_float, as_full = (ranked == each[:, None] for each in wanted)
    low, high = of_share(int(as_full[:, 0].sum()), n)
    shares = [
        100 * float(hits.double().mean())
        for each in (as_float, as_full)
        for hits in (each[:, 0], each.any(1))
    ]
    interval = (100 * low, 100 * high)
    return Row(way, block, 100 * saved, shares[0], shares[1], shares[2], shares[3], interval)


def own_projections(tower: Any, block: int) -> ClassTokenWeights:
    """Keys and values as the blocks after the exit have them, nothing fitted."""
    later = [cast(Int8Block, each) for each in list(blocks_of(tower))[block + 1 :]]
    linears = [in_proj_of(each) for each in later]
    D = tower_spec(tower).width
    w = torch.stack([linear.weight[D:].float() for linear in linears])
    b = torch.stack(
        [w.new_zeros(2 * D) if each.bias is None else each.bias[D:] for each in linears]
    )
    return ClassTokenWeights(w, b, embedding_size(tower))


def rows_of(learn: Pair, report: Pair, n: int, m: int, steps: int) -> Iterator[Row]:
    """All rows; n photos of TRAIN, m of REPORT."""
    tower = find_tower(learn.fast)
    candidates, parts = choose_candidates(len(blocks_of(tower))), PartFlops.as_run(tower)
    some = torch.zeros(n, dtype=torch.bool)
    some[torch.arange(min(n, FIT_IMAGES)) * n // min(n, FIT_IMAGES)] = True
    every = torch.ones(m, dtype=torch.bool)
    embeddings = report.embeddings()
    full = embeddings["full"]
    wanted = [
        neighbours(y, y, 1, torch.arange(m))[:, 0]
        for y in (unit(embeddings[name].float()) for name in ("teacher", "full"))
    ]
    yield row("int8 at full depth", len(blocks_of(tower)), 0.0, full, full, wanted)
    fitted = fit(learn, some, candidates)
    own = {e: own_projections(tower, e) for e in candidates}
    for way, weights in (("class token alone, fitted", fitted), ("class token alone", own)):
        y = continued(report, every, weights)
        for place, (e, head) in enumerate(heads_of(tower, weights).items()):
            saved = 1 - parts.when_leaving([e], [2 * head.macs])[0] / parts.total
            yield row(way, e, saved, y[:, place], y[:, place], wanted)
            if weights is not fitted:
                continue
            yield row(f"{way}; index at full depth", e, saved, y[:, place], full, wanted)
            mixed = y[:, place].clone()
            mixed[::2] = full[::2]
            yield row(f"{way}; half at full depth", e, saved / 2, mixed, mixed, wanted)
    if steps:
        yield from head_rows(learn, report, n, candidates, parts, wanted, steps)


def head_rows(
    learn: Pair, report: Pair, n: int, candidates: Sequence[int], parts: PartFlops,
    wanted: Sequence[Tensor], steps: int,
) -> Iterator[Row]:  # fmt: skip
    """Heads of BEST_HEAD on centre crops, trained for so many steps."""
    blocks = [*candidates, candidates[-1] + 1]
    options = replace(BEST_HEAD, steps=steps, views=0)
    every = [torch.ones(count, dtype=torch.bool) for count in (n, len(wanted[0]))]
    features, held_out = (
        pair.pooled(blocks, marked, view_seed=None)
        for pair, marked in zip((learn, report), every, strict=True)
    )
    for place, block in enumerate(blocks):
        head = train_head(
            features["pooled"][:, place], features["teacher"], options=options, seed=0
        )
        y = head(held_out["pooled"][:, place].float())
        saved = 1 - parts.when_leaving([block], [2 * head.macs])[0] / parts.total
        yield row("trained head", block, saved, y, y, wanted)


def main(
    train: Path,
    report: Path,
    model: str = "lraee-tiny",
    out: Path = Path("results/search_exits.json"),
    limit: Annotated[int | None, typer.Option(help="photos of each, spread evenly")] = None,
    steps: Annotated[int, typer.Option(help="of heads; 0 leaves them out")] = 3000,
) -> None:
    """Print the table, and write it as JSON."""
    opened = open_model(model)
    fast = accelerate(opened.model)
    learn, check = (
        PhotoImages(Photos(path, limit=limit), opened.with_margin) for path in (train, report)
    )
    pairs = [Pair(opened.model, fast, each, batch=64, progress=True) for each in (learn, check)]
    rows = []
    columns = ("way", "after block", "FLOPs saved, %", "nearest as float", "among 5",
               "nearest as int8 at full depth", "among 5")  # fmt: skip
    typer.echo(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for each in rows_of(pairs[0], pairs[1], len(learn.names), len(check.names), steps):
        rows.append(asdict(each))
        low, high = each.interval
        typer.echo(
            f"| {each.way} | {each.block} | {each.flops_saved:.1f} | {each.as_float:.1f} |"
            f" {each.float_among_5:.1f} | {each.as_full:.1f} ({low:.1f} … {high:.1f}) |"
            f" {each.full_among_5:.1f} |"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    header = {**machine.describe(), "model": model, "photos": len(learn.names)}
    content = {**header, "report_photos": len(check.names), "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
