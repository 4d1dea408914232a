"""The command `lraee merge`: shards of `lraee embed` to one output."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import command


@command
def merge(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARD...", exists=True, help="What each `lraee embed --shard i/n` wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of parts, or FILE.parquet; must be new.")],
) -> None:
    """Join the shards of one embedding run: all there, made alike, no photo twice.

    Example: `lraee merge shard-1 shard-2 --out embeddings`
    """
    from lraee.data.names import printable
    from lraee.serving.merge import merge
    from lraee.serving.output import Output

    with Output(out) as output:
        merged = merge(shards, output)
    if merged.photos_from:
        folders = ", ".join(map(printable, merged.photos_from))
        typer.echo(
            f"merge: the shards' photos lie in {folders}; `lraee serve` needs --photos-from",
            err=True,
        )
    totals = merged.totals
    typer.echo(
        f"{printable(str(out))}: {totals.embedded} embedded, {totals.skipped.total()} skipped,"
        f" {len(shards)} shards"
    )
