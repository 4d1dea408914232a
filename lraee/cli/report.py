"""The command `lraee report`: the whole study as one JSON, one page and small pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lraee.cli.common import command, require_writable

if TYPE_CHECKING:
    from lraee.data.classes import Classes
    from lraee.study.dose.protocol import Doses
    from lraee.zoo.opening import Opened


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
    dose: Annotated[
        str | None,
        typer.Option(
            help="Dose and response instead, as in 1,8,16,24,32,40: factors of four channels of"
            " each norm, undone behind it. Float stays the same, quantization noise grows."
        ),
    ] = None,
    reduced: Annotated[
        bool,
        typer.Option("--reduced", help="With --dose: one seed, 2,000 photos, 6,000 to learn from."),
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from", exists=True, help="A report.json or dose.json: makes its page again."
        ),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Find out what quantization and early exits do to a model: one JSON, one page.

    Runs in float, INT8 and the paper's INT8: noise, heads by depth, exits and their rivals, what
    is rescued and lost, and what it saves. Nothing is chosen on the photos reported on.

    With --dose the question is in which range of noise each claim holds: see docs/study.md.

    Example: `lraee report --data train.zip --report-data val.zip --classes classes.json --out DIR`
    """
    from lraee.study.page import remade, write_report

    if again is not None:
        typer.echo(f"written         {remade(again)}")
        return
    if data is None or classes is None:
        raise typer.BadParameter("--data and --classes must be given, or --from report.json")
    if reduced and dose is None:
        raise typer.BadParameter("--reduced must come with --dose")
    from dataclasses import replace

    from lraee.data.classes import read_classes
    from lraee.study import command as study_command
    from lraee.study.protocol import FAST, Protocol
    from lraee.zoo.opening import open_model

    require_writable(out, is_folder=True)
    if dose is not None:
        from lraee.study.dose.protocol import REDUCED_LEARN, REDUCED_REPORT, Doses, parse_doses

        try:
            scales = parse_doses(dose)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        _run_doses(
            open_model(model, pretrained), data, report_data, read_classes(classes), out=out,
            doses=Doses(scales, tuple(range(1 if reduced else seeds))),
            limits=(REDUCED_LEARN, REDUCED_REPORT) if reduced else (limit, limit),
            is_fast=fast, prompts=templates, progress=progress,
        )  # fmt: skip
        return
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


def _run_doses(
    opened: "Opened",
    data: Path,
    report_data: Path | None,
    classes: "Classes",
    *,
    out: Path,
    doses: "Doses",
    limits: tuple[int | None, int | None],
    is_fast: bool,
    prompts: int,
    progress: bool,
) -> None:
    """The dose study, its files, and a line per backbone and dose."""
    from lraee.study import command as study_command
    from lraee.study.dose.command import dose_study
    from lraee.study.dose.protocol import DOSE_PROTOCOL, FAST_DOSES
    from lraee.study.page import write_doses

    result = dose_study(
        opened, classes,
        study_command.sides(data, report_data, classes, limit=limits[0], report_limit=limits[1]),
        work=out / "work-dose", protocol=FAST_DOSES if is_fast else DOSE_PROTOCOL, doses=doses,
        prompts=prompts, progress=progress,
    )  # fmt: skip
    written = write_doses(result, out)
    for row in result["rescue"]:
        typer.echo(
            f"{row['backbone']:<16} dose {row['dose']:<4g} {row['recipe']:<20}"
            f" loss {row['quantization_loss']['value']:6.2f}"
            f"  rescued - lost {row['margin']['value']:6.2f}"
            f"  above float {row['owed']['value']:6.2f} \u00b1 {2 * row['owed']['error']:.2f}"
        )
    for claim in result["claims"]:
        if claim["backbone"] == "paper":
            typer.echo(f"{claim['claim']} ({claim['recipe'] or 'all'}): {claim['words']}")
    typer.echo(f"written         {', '.join(map(str, written))}")
