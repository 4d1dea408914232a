"""The command `lraee report`: the whole study as one JSON, one page and small pictures."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import command, require_writable


@command
def report(
    data: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or ZIP to learn from, one folder per class."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, help='JSON with "wnids" (folder names) and "names" (words).'),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder for report.json, its page and pictures; a run cut off goes on."),
    ] = Path("results/report"),
    model: Annotated[
        str, typer.Option(help="Of the zoo, of open_clip, or a folder of train_lraee_tiny.")
    ] = "lraee-tiny",
    pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of an open_clip model.")
    ] = None,
    report_data: Annotated[
        Path | None,
        typer.Option(exists=True, help="Photos to report on. [default: a fifth of --data]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of splits, heads and policies.")] = 3,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many photos of each, evenly spread.")
    ] = None,
    templates: Annotated[int, typer.Option(min=1, max=80, help="Prompts per class.")] = 8,
    fast: Annotated[
        bool, typer.Option("--fast", help="Short trainings: everything is there, figures are not.")
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option("--from", exists=True, help="A report.json: makes its page again, beside it."),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Find out what quantization and early exits do to a model: one JSON, one page.

    Runs in float, INT8 and the paper's INT8: noise, heads by depth, exits and their rivals, what
    is rescued and lost, and what it saves. Nothing is chosen on the photos reported on.

    Example: `lraee report --data train.zip --report-data val.zip --classes classes.json --out DIR`
    """
    from lraee.study.page import read_report, write_page, write_report

    if again is not None:
        page = again.with_name("report.html")
        write_page(read_report(again), page)
        typer.echo(f"written         {page}")
        return
    if data is None or classes is None:
        raise typer.BadParameter("--data and --classes must be given, or --from report.json")
    from dataclasses import replace

    from lraee.data.classes import read_classes
    from lraee.study import command as study_command
    from lraee.study.protocol import FAST, Protocol
    from lraee.zoo.opening import open_model

    require_writable(out, is_folder=True)
    known = read_classes(classes)
    protocol = replace(FAST if fast else Protocol(), seeds=tuple(range(seeds)))
    result = study_command.study(
        open_model(model, pretrained), known,
        study_command.sides(data, report_data, known, limit=limit),
        work=out / "work", protocol=protocol, prompts=templates, progress=progress,
    )  # fmt: skip
    written = write_report(result, out)
    for row in result["main"]:
        saved, top1 = row["flops_saved"]["mean"], row["top1"]
        typer.echo(
            f"{row['backbone']:<6} {row['name']:<34} {top1['mean']:6.2f} ± {top1['std']:.2f} %"
            f" {saved:6.1f} % saved"
        )
    typer.echo(f"written         {', '.join(map(str, written))}")
