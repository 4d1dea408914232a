"""The command `lraee embed`: photos or texts to Parquet."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import AsJson, Checkpoint, Model, Pretrained, Show, command

Scheme = Annotated[
    str | None,
    typer.Option(help="int8, int8-patches or paper. [default: that of --exits, else int8]"),
]


@command
def embed(
    photos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PHOTOS",
            help="Folder, ZIP, .tar shards (or a glob), a .txt of paths, or - for paths on stdin.",
        ),
    ] = None,
    *,
    out: Annotated[
        Path, typer.Option(help="Folder of parts, or FILE.parquet; a run cut off goes on there.")
    ],
    texts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Instead of PHOTOS: one text a line."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="int8: texts by an int8 text tower. [default: float]")
    ] = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Scheme = None,
    checkpoint: Checkpoint = None,
    exits: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="From `lraee calibrate`.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the embeddings: float32 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Photos per call of the tower.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Decode threads; 0: one per CPU.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="i/n: this share of the photos; join them by `lraee merge`.")
    ] = None,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Photos per part: what a kill can cost.")
    ] = 1024,
    exact: Annotated[
        bool,
        typer.Option("--exact/--fast", help="The pixels of the model's transform, or faster."),
    ] = False,
    limit_pixels: Annotated[
        int, typer.Option(min=1, help="Photos of more pixels are skipped.")
    ] = 178_956_970,
    limit_bytes: Annotated[int, typer.Option(min=1, help="Files of more bytes are skipped.")] = 64
    << 20,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Embed on this Ray cluster.")
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="Processes on the cluster.")] = 1,
    as_json: AsJson = False,
    progress: Show = True,
) -> None:
    """Embed photos or texts: Parquet files with path, embedding, size and time.

    Skipped files go to failures.parquet with the reason. Run the same command again after a kill:
    what is there is kept, the rest is embedded, and the files are those of one whole run.

    Example: `lraee embed ~/photos --out embeddings`, or
    `find . -name '*.jpg' -print0 | lraee embed - --out photos.parquet`
    """
    from lraee.data import decoding
    from lraee.data.names import printable
    from lraee.data.sources import Limits
    from lraee.layers.scheme import find_scheme
    from lraee.model.opened import require_one
    from lraee.model.text import require_text_scheme
    from lraee.serving.embed import Shard, run
    from lraee.serving.embed_model import DTYPES, MAX_SECONDS, Choice, PhotoModel, TextModel
    from lraee.serving.listing import TextListing, open_listing
    from lraee.serving.output import Output

    if bool(photos) == bool(texts):
        raise typer.BadParameter("PHOTOS or --texts must be given, and not both")
    if texts is None and text is not None:
        raise typer.BadParameter("--text is of --texts, and they are missing")
    if texts is not None and exits is not None:
        raise typer.BadParameter("--exits are of PHOTOS; a text tower has none")
    if texts is not None and scheme is not None and text is None:
        raise typer.BadParameter("--scheme with --texts needs --text int8: the tower is float")
    if ray is not None and (texts or shard or photos == ["-"]):
        raise typer.BadParameter("--ray takes PHOTOS that each machine can list, and no --shard")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        share = None if shard is None else Shard.parse(shard)
        if scheme is not None:
            find_scheme(scheme)
        require_one(scheme, checkpoint)
        require_one(text, checkpoint, "text")
        require_text_scheme(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    limits = decoding.Limits(
        max_bytes=limit_bytes, max_pixels=limit_pixels, max_seconds=MAX_SECONDS
    )
    reading = Limits(file_size_bytes=limit_bytes)
    listing = TextListing(texts) if texts else open_listing(photos or [], reading)
    with Output(out) as output:
        choice = Choice(
            model, _version(), pretrained, scheme=scheme, exits=exits, limits=limits, dtype=dtype,
            mode="exact" if exact else "fast", checkpoint=checkpoint, text=text,
        )  # fmt: skip
        if ray is not None:
            from lraee.serving import ray as on_ray

            job = on_ray.Job(
                tuple(photos or ()), choice, reading, PhotoModel(choice).settings,
                batch=batch, cpus=workers or 1,
            )  # fmt: skip
            totals = on_ray.run(job, output, address=ray, actors=actors, part_rows=part_rows)
        else:
            totals = run(
                listing, TextModel(choice, batch) if texts else PhotoModel(choice), output,
                shard=share, batch=batch, workers=workers, part_rows=part_rows, progress=progress,
            )  # fmt: skip
    typer.echo(
        json.dumps(totals.as_json()) if as_json else f"{printable(str(out))}: {totals.line()}"
    )


def _version() -> str:
    from importlib.metadata import version

    return version("lraee")
