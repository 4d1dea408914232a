"""Wall-clock time that early exits save, beside the FLOPs they save, and what they can cost.

    python -m bench.exit_time PHOTOS.zip --exits EXITS     # lraee-tiny, exits from lraee calibrate
    python -m bench.exit_time --tower ViT-B-32             # random weights and heads
    python -m bench.exit_time --tower ViT-B-32 --leave 8:0.4

Per batch size, in turn on the same photos: full depth; the exits as they are; and the same probes
with thresholds that no image reaches, which is the most that exits can cost. Without exits of its
own a tower gets three random heads (2 D -> 512 -> E, 1,000 classes) whose thresholds let about a
tenth, a quarter and a third of the photos leave after blocks 8, 10 and 11 of 12, as the paper has
it, or --leave: time does not depend on what heads know. lraee.calibrate would not open three where
one probe costs more than 0.7 % of the tower; how many it would is printed beside the plan.
FLOPs are those that are run: of the last block the class token's alone (PartFlops.as_run).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, cast

import torch
import typer
from torch import Tensor, nn

import lraee
from bench.environment import describe
from lraee.calibration.probe_time import measure
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.exits.bundle import Exits
from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.measurement.timing import ImageEncoder, interleaved
from lraee.model.acceleration import acceleration_of
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, find_tower, tower_spec
from lraee.towers.runner import exits_of
from lraee.zoo.opening import open_model

HIDDEN, NUM_CLASSES = 512, 1000
SHARES = {8: 0.101, 10: 0.253, 11: 0.321}
AS_THE_PAPER = [f"{block}:{share}" for block, share in SHARES.items()]
PHOTOS = 256


def random_exits(fast: nn.Module, shares: Mapping[int, float] = SHARES) -> Exits:
    """Random heads after these blocks of 12; no image exits yet."""
    tower, record = find_tower(fast), acceleration_of(fast)
    assert record is not None
    D, E = tower_spec(tower).width, embedding_size(tower)
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source) / math.sqrt(shape[-1])

    def head() -> HeadWeights:
        w1, b1, w2, b2 = normal(HIDDEN, 2 * D), normal(HIDDEN), normal(E, HIDDEN), normal(E)
        return HeadWeights(torch.ones(2 * D), torch.zeros(2 * D), w1, b1, w2, b2)

    depths = tuple(block * len(blocks_of(tower)) // 12 for block in shares)
    gate = Gate("confidence", ((0.0,) * 4,) * len(depths), (math.inf,) * len(depths))
    return Exits(
        heads={depth: head() for depth in depths},
        plans={"confidence": Plan(depths, gate)},
        chosen="confidence",
        classes=torch.nn.functional.normalize(normal(NUM_CLASSES, E), dim=1),
        logit_scale=100.0,
        compaction=Compaction(),
        scheme=record.scheme,
        base_hash=record.base_hash,
        card={"made": "random heads"},
    )


def with_thresholds(exits: Exits, thresholds: tuple[float, ...]) -> Exits:
    """The chosen plan with other thresholds."""
    gate = replace(exits.plan.gate, thresholds=thresholds)
    return replace(exits, plans={exits.chosen: replace(exits.plan, gate=gate)})


@torch.inference_mode()
def spread(
    model: nn.Module, exits: Exits, images: Tensor, shares: Mapping[int, float] = SHARES
) -> Exits:
    """Thresholds by which the images leave in these shares."""
    fast = lraee.accelerate(model, scheme=exits.scheme, exits=exits)
    with lraee.trace(fast) as t:
        run(fast, images, 32)
    thresholds, is_inside = [], torch.ones(len(images), dtype=torch.bool)
    for column, share in zip(t.scores.T, shares.values(), strict=True):
        ranked = column[is_inside].sort(descending=True).values
        thresholds.append(float(ranked[min(round(share * len(images)), len(ranked) - 1)]))
        is_inside &= column < thresholds[-1]
    return with_thresholds(exits, tuple(thresholds))


def run(fast: nn.Module, images: Tensor, batch: int) -> None:
    """Encodes all images."""
    for part in torch.split(images, batch):
        cast(ImageEncoder, fast).encode_image(part)


def table(fast: nn.Module, images: Tensor, batch: int, budget_s: float) -> list[str]:
    """One row of the Markdown table; checks first that exits off is the same computation."""
    router = exits_of(find_tower(fast))
    assert router is not None
    opened = router.gate
    closed = replace(opened, thresholds=(math.inf,) * len(opened.thresholds))

    def at_full_depth() -> None:
        with lraee.full_depth(fast):
            run(fast, images, batch)

    def with_gate(gate: Gate) -> Callable[[], None]:
        def call() -> None:
            router.gate = gate
            run(fast, images, batch)

        return call

    variants = {
        "full": at_full_depth, "exits": with_gate(opened), "closed": with_gate(closed),
        "full again": at_full_depth,
    }  # fmt: skip
    seconds = interleaved(variants, budget_s=budget_s)
    router.gate = opened
    with lraee.trace(fast) as t:
        run(fast, images, batch)

    def ratio(name: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds["full"], strict=True))

    saved, flops = 1.0 - ratio("exits"), t.flops_saved
    ms = 1e3 * median(seconds["full"]) / math.ceil(len(images) / batch)
    return [
        str(batch), f"{ms:.2f}", f"{100 * flops:.1f}", f"{100 * saved:.1f}",
        f"{100 * saved / flops:.0f}" if flops else "", f"{100 * (ratio('closed') - 1):+.1f}",
        f"{100 * (ratio('full again') - 1):+.1f}",
    ]  # fmt: skip


def leaving_of(words: list[str]) -> dict[int, float]:
    """BLOCK:SHARE, …: which share of all images leaves after which of 12 blocks, ascending.

    Raises: typer.BadParameter on anything else.
    """
    shares: dict[int, float] = {}
    for word in words:
        block, _, share = word.partition(":")
        try:
            depth, leaving = int(block), float(share)
        except ValueError:
            depth, leaving = 0, math.nan
        if not (1 <= depth < 12 and 0 <= leaving <= 1):
            raise typer.BadParameter(
                "--leave must be BLOCK:SHARE, a block of 1 to 11 and a share of 0 to 1,"
                f" got {word!r}"
            )
        shares[depth] = leaving
    return dict(sorted(shares.items()))


def main(
    photos: Annotated[Path | None, typer.Argument()] = None,
    exits: Path | None = None,
    tower: str = "lraee-tiny",
    scheme: str = "int8",
    leave: list[str] = AS_THE_PAPER,
    batch: list[int] = [1, 8, 32],  # noqa: B006 (typer's way to give a list)
    count: int = PHOTOS,
    budget_s: float = 60.0,
) -> None:
    """Print the table."""
    opened = open_model(tower, may_be_random=True)
    loaded = None if exits is None else Exits.load(exits)
    plain = lraee.accelerate(opened.model, scheme=scheme if loaded is None else loaded.scheme)
    size = tower_spec(find_tower(plain)).image_size
    if photos is None:
        images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    else:
        images = torch.cat(list(PhotoImages(Photos(photos, limit=count), opened.preprocess)))
    leaving = leaving_of(leave)
    timed = loaded or spread(opened.model, random_exits(plain, leaving), images, leaving)
    fast = lraee.accelerate(opened.model, scheme=timed.scheme, exits=timed)
    for key, value in describe().items():
        typer.echo(f"{key:<10} {value}")
    gate = timed.plan.gate.kind
    typer.echo(
        f"{'plan':<10} {gate} gate after blocks {list(timed.plan.blocks)}; {len(images)} photos"
    )
    block, classes = timed.plan.blocks[0], timed.classes
    assert classes is not None
    head = cast(HeadWeights, timed.heads[block])
    time = measure(plain, block, head, classes, timed.logit_scale)
    shares = [p / t for p, t in zip(time.probe_us, time.tower_us, strict=True)]
    typer.echo(
        f"{'probe':<10} {', '.join(f'{100 * share:.2f} %' for share in shares)} of the tower at"
        f" batch 1, 32, so that lraee.calibrate opens {time.most_exits} at most; copying an image"
        f" takes {time.copy_share:.3f} of a block on it"
    )
    typer.echo(
        "| batch | full depth, ms | FLOPs saved, % | time saved, % | of FLOPs saved, % |"
        " no image exits, % | full depth again, % |\n|---|---|---|---|---|---|---|"
    )
    with torch.inference_mode():
        for size_of_batch in batch:
            cells = table(fast, images[: max(size_of_batch, 64)], size_of_batch, budget_s)
            typer.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
