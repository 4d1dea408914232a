"""The command `lraee`: doctor, demo, evaluate, bench.

Exit codes: 0 it worked, 1 it could not be done (one line says why), 2 wrong usage.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Column, Table

P = ParamSpec("P")
Show = Annotated[bool, typer.Option(help="Show progress bars.")]
Model = Annotated[str, typer.Option(help="A model of the zoo, or of open_clip.")]
Pretrained = Annotated[
    str | None, typer.Option(help="Tag or weights file of an open_clip model; the zoo needs none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

app = typer.Typer(
    help="CLIP image encoders in INT8.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1; bugs keep their traceback."""
    from lraee.models import ModelError
    from lraee.sources import DataError

    try:
        yield
    except (DataError, ModelError, NotImplementedError, OSError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        _err.print(f"lraee: error: {text}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        if not str(error).startswith("LRAEE_"):
            raise
        _err.print(f"lraee: error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _command(function: Callable[P, None]) -> Callable[P, None]:
    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        with _one_line_errors():
            function(*args, **kwargs)

    return app.command(epilog=None)(guarded)


@_command
def doctor(as_json: AsJson = False) -> None:
    """Say which implementation of each operator runs here, and why the others do not.

    Example: `lraee doctor`, or `lraee doctor --json > doctor.json`
    """
    from lraee import doctor

    found = doctor.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for key in ("machine", "threads", "versions"):
        _line(key, str(found[key]))
    for level, state in found["isa"].items():
        _line(f"isa {level}", state)
    for row in found["cuda"]:
        _line("cuda", row)
    for group in doctor.grouped(found["operators"]):
        _out.print(f"\non {group.device} tensors: {group.runs}", markup=False, soft_wrap=True)
        _out.print(f"    for {', '.join(group.operators)}", markup=False, soft_wrap=True)
        for name, reason in group.others.items():
            _out.print(f"    not {name}: {reason}", markup=False, soft_wrap=True)


@_command
def demo(
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or ZIP of photos; else scikit-image's photos."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many of your photos.")] = 64,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("results/demo.json"),
    progress: Show = True,
) -> None:
    """Run a real CLIP on real photos: float against int8, and each photo's zero-shot answer.

    Example: `lraee demo --data ~/photos`, or `lraee demo --model ViT-B-32 --pretrained openai`
    """
    from lraee import demo, evaluate
    from lraee.models import open_model

    photos = demo.open_photos(data, limit)
    found = demo.run(open_model(model, pretrained), photos, progress=progress)
    evaluate.write_json(found, out)
    _line("model", f"{found['model']}, {found['classes']} class names")
    _line("machine", f"{found['machine']}, {found['threads']} threads, {found['operators']}")
    _line("photos", f"{found['photos']}; {photos.report()}")
    table = Table(Column("photo", overflow="fold"), "float", "", "int8", "")
    for row in found["answers"]:
        same = "" if row["float_name"] == row["int8_name"] else "[red]"
        shares = (f"{100 * row[f'{form}_share']:.0f} %" for form in ("float", "int8"))
        float_share, int8_share = shares
        int8_name = same + row["int8_name"]
        table.add_row(row["photo"], row["float_name"], float_share, int8_name, int8_share)
    _out.print(table)
    _out.print(_row_table(found["rows"]))
    _line("written", str(out))


@_command
def evaluate(
    data: Annotated[Path, typer.Option(exists=True, help="Folder or ZIP, one folder per class.")],
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, help='JSON with "wnids" (folder names) and "names" (words).'),
    ] = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Annotated[
        list[str] | None, typer.Option(help="int8 or paper; again for more. Both by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many photos, evenly spread.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos per call.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
    progress: Show = True,
) -> None:
    """Measure what quantization costs on labelled photos, beside the float model.

    Example: `lraee evaluate --data val.zip --classes classes.json --out results/evaluate.json`
    """
    from lraee import evaluate
    from lraee.accelerate import accelerate
    from lraee.classes import TEMPLATES, class_features, read_classes
    from lraee.data import Photos
    from lraee.models import open_model
    from lraee.quantize import find_scheme

    schemes = scheme or ["int8", "paper"]
    try:
        for name in schemes:
            find_scheme(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    known = read_classes(classes) if classes else None
    photos = Photos(data, classes=known, limit=limit)
    opened = open_model(model, pretrained)
    models = {evaluate.FLOAT: opened.model}
    models |= {name: accelerate(opened.model, scheme=name) for name in schemes}
    names = known.names if known else opened.class_names
    embedded = evaluate.embed(models, photos, opened.preprocess, batch=batch, progress=progress)
    class_rows = class_features(opened.model, opened.tokenizer, names, progress=progress).cpu()
    if known and all(label is None for label in embedded.labels):
        _err.print(
            "lraee: no folder is named by a wnid of the classes: top-1 and top-5 are left out"
        )
    rows = evaluate.compare(embedded, models, class_rows)
    settings = {"batch": batch, "limit": limit, "classes": len(names), "templates": len(TEMPLATES)}
    title = opened.title
    found = evaluate.report(rows, photos, embedded, model=title, data=data.name, **settings)
    if out is not None:
        evaluate.write_json(found, out)
    _line("model", f"{title}, {len(names)} class names, {len(TEMPLATES)} templates")
    _line("machine", f"{found['machine']}, {found['threads']} threads, {found['operators']}")
    _line("photos", f"{found['photos']}, {found['labelled']} labelled; {photos.report()}")
    _out.print(_row_table(found["rows"]))
    if out is not None:
        _line("written", str(out))


@_command
def bench(
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Photos per call; again for more sizes.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Per batch size.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Time the image tower: torch float32, torch bfloat16 and int8, taking turns.

    Weights are random where no `--pretrained` is given: time does not depend on them.

    Example: `lraee bench --model ViT-B-32 --batch 1 --batch 32`
    """
    from lraee import evaluate, machine, timing
    from lraee.accelerate import accelerate
    from lraee.models import open_model

    opened = open_model(model, pretrained, may_be_random=True)
    models = {**timing.float_and_bfloat16(opened.model), "int8": accelerate(opened.model)}
    rows = timing.time_tower(models, timing.image_size(opened.model), batch or [1, 8, 32], seconds)
    header = machine.describe()
    _line("model", opened.title)
    _line("machine", f"{header['machine']}, {header['threads']} threads, {header['operators']}")
    table = Table("batch", "variant", "ms", "p20-p80", "photos/s", "x float32")
    for row in rows:
        t = row.timing
        span = f"{t.p20_ms:.1f}-{t.p80_ms:.1f}"
        rate, speedup = f"{row.images_per_s:.1f}", f"{row.speedup:.2f}"
        table.add_row(str(row.batch), row.variant, f"{t.median_ms:.1f}", span, rate, speedup)
    _out.print(table)
    if out is not None:
        found = {"schema": timing.SCHEMA, **header, "model": opened.title}
        evaluate.write_json({**found, "rows": [asdict(row) for row in rows]}, out)
        _line("written", str(out))


def _row_table(rows: list[dict[str, Any]]) -> Table:
    """Forms of the model as columns, so that it fits a narrow terminal."""
    figures = {
        "top1": ("top-1 %", 1.0, 2),
        "top5": ("top-5 %", 1.0, 2),
        "agreement": ("top-1 as float's %", 1.0, 2),
        "neighbours": ("nearest photo as float's %", 1.0, 2),
        "cosine_mean": ("cosine with float's, mean", 1.0, 5),
        "cosine_p01": ("cosine, 1st percentile", 1.0, 5),
        "time_ms": ("ms per photo", 1.0, 2),
        "weight_bytes": ("image tower, MB", 1e-6, 2),
        "not_finite": ("photos not finite", 1.0, 0),
    }
    table = Table("", *(row["scheme"] for row in rows))
    for key, (title, factor, digits) in figures.items():
        if all(row[key] is not None for row in rows):
            table.add_row(title, *(f"{factor * row[key]:.{digits}f}" for row in rows))
    return table


def _line(key: str, text: str) -> None:
    _out.print(f"{key:<16}{text}", markup=False, soft_wrap=True)
