"""The command `lraee bench`: times the image tower."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lraee.cli.common import Model, Pretrained, command, console, line, require_writable


@command
def bench(
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Photos per call; again for more sizes.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Per batch size.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Time the image tower: torch float32, torch bfloat16 and int8, in interleaved rounds.

    Weights are random where no `--pretrained` is given: time does not depend on them.

    Example: `lraee bench --model ViT-B-32 --batch 1 --batch 32`
    """
    from lraee.measurement import machine, timing
    from lraee.model.accelerate import accelerate
    from lraee.storage.json import write_json
    from lraee.towers.families import as_input, image_size
    from lraee.zoo.opening import open_model

    if out is not None:
        require_writable(out)
    opened = open_model(model, pretrained, may_be_random=True)
    models = {**timing.float_and_bfloat16(opened.model), "int8": accelerate(opened.model)}
    rows = timing.time_tower(
        models, image_size(opened.model), batch or [1, 8, 32], seconds, as_input=as_input
    )
    header = machine.describe()
    if out is not None:
        result = {"schema": timing.SCHEMA, **header, "model": opened.title}
        write_json({**result, "rows": [asdict(row) for row in rows]}, out)
    line("model", opened.title)
    line("machine", f"{header['machine']}, {header['threads']} threads, {header['operators']}")
    table = Table("batch", "variant", "ms", "p20-p80", "photos/s", "x float32")
    for row in rows:
        t = row.timing
        span = f"{t.p20_ms:.1f}-{t.p80_ms:.1f}"
        rate, speedup = f"{row.images_per_s:.1f}", f"{row.speedup:.2f}"
        table.add_row(str(row.batch), row.variant, f"{t.median_ms:.1f}", span, rate, speedup)
    console.print(table)
    if out is not None:
        line("written", str(out))
