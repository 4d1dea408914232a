"""The command `lraee`: one function per command here, or one file beside this one.

Exit codes: 0 it worked, 1 it could not be done (one line says why), 2 wrong usage.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from lraee.calibration.head_training import Training
from lraee.cli import embed as cli_embed
from lraee.cli import merge as cli_merge
from lraee.cli import report as cli_report
from lraee.cli import serve as cli_serve
from lraee.cli import tables
from lraee.diagnostics import interpreter
from lraee.exits.gate import GateKind

P = ParamSpec("P")
Show = Annotated[bool, typer.Option(help="Show progress bars.")]
Model = Annotated[str, typer.Option(help="A model of the zoo, or of open_clip.")]
Pretrained = Annotated[
    str | None, typer.Option(help="Tag or weights file of an open_clip model; the zoo needs none.")
]
Data = Annotated[Path, typer.Option(exists=True, help="Folder or ZIP, one folder per class.")]
ClassFile = Annotated[
    Path | None,
    typer.Option(exists=True, help='JSON with "wnids" (folder names) and "names" (words).'),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many photos, evenly spread.")]
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
    if interpreter.is_wanted(sys.argv[1:]):
        interpreter.restart()
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1; bugs keep their traceback."""
    from lraee.data.sources import DataError
    from lraee.storage.files import CheckpointError
    from lraee.zoo.opening import ModelError

    try:
        yield
    except (
        CheckpointError, DataError, ImportError, ModelError, NotImplementedError, OSError,
    ) as error:  # fmt: skip
        text = (str(error).splitlines() or [type(error).__name__])[0]
        _err.print(f"lraee: error: {text}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        # The door's own lines: the environment's, and those of the functions behind a command
        if not str(error).startswith(
            ("LRAEE_", "calibrate: ", "accelerate: ", "retrieval: ", "serve: ")
        ):
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
    from lraee.diagnostics import doctor

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
    """Run a real CLIP on real photos: float, int8 and early exits, with zero-shot answers.

    The exits are learned on the spot from crops of the photos.

    Example: `lraee demo --data ~/photos`, or `lraee demo --model ViT-B-32 --pretrained openai`
    """
    from lraee.evaluation import demo, evaluate
    from lraee.zoo.opening import open_model

    photos = demo.open_photos(data, limit)
    found = demo.run(open_model(model, pretrained), photos, progress=progress)
    evaluate.write_json(found, out)
    _line("model", f"{found['model']}, {found['classes']} class names")
    _line("machine", f"{found['machine']}, {found['threads']} threads, {found['operators']}")
    _line("photos", f"{found['photos']}; {photos.report()}")
    plan = found["plan"]
    _line(
        "exits", f"after blocks {plan['exits']}, learned from {found['crops']} crops of the photos"
    )
    _out.print(tables.of_answers(found["answers"]))
    _out.print(tables.of_forms(found["rows"]))
    _line("written", str(out))
    _line("next", "lraee embed PHOTOS --out DIR embeds a library of any size")


@_command
def calibrate(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the exits; a run cut off goes on there.")],
    classes: ClassFile = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Annotated[
        str, typer.Option(help="int8, int8-patches or paper: how the tower is quantized.")
    ] = "int8",
    recipe: Annotated[str, typer.Option(help="best, or paper: LRA-EE as published.")] = "best",
    gate: Annotated[
        GateKind | None,
        typer.Option(help="What decides; agreement and static need no classes. [default: learned]"),
    ] = None,
    class_free: Annotated[
        bool, typer.Option("--class-free", help="For retrieval: gates see no class texts.")
    ] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="Gates and thresholds count what the folders say.")
    ] = False,
    training: Annotated[
        Training | None,
        typer.Option(help="Of the heads; labels and both need --labels. [default: the recipe's]"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Mean FLOPs over full depth's, at most. [default: 0.8]")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Instead of --budget: loss against full depth, at most.")
    ] = None,
    delta: Annotated[float, typer.Option(help="How often --epsilon may fail.")] = 0.05,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos per call.")] = 64,
    seed: Annotated[int, typer.Option(help="Of splits, crops and heads.")] = 0,
    timed: Annotated[
        bool, typer.Option(help="Measure here how many probes are worth their time.")
    ] = True,
    progress: Show = True,
) -> None:
    """Learn early exits from photos: heads, gates and thresholds, for `accelerate(exits=…)`.

    Example: `lraee calibrate --data train.zip --classes classes.json --out exits`
    """
    from lraee.calibration.calibrate import calibrate
    from lraee.data.batches import PhotoImages
    from lraee.data.classes import class_features, read_classes
    from lraee.data.photos import Photos
    from lraee.model.accelerate import accelerate
    from lraee.zoo.opening import open_model

    known = read_classes(classes) if classes else None
    if labels and known is None:
        raise typer.BadParameter("--labels needs --classes, which names the folders")
    photos = Photos(data, classes=known, limit=limit)
    opened = open_model(model, pretrained)
    images = PhotoImages(photos, opened.with_margin, batch=batch, progress=progress)
    names = known.names if known else opened.class_names
    texts = None
    if not class_free:
        texts = class_features(opened.model, opened.tokenizer, names, progress=progress)
    exits = calibrate(
        accelerate(opened.model, scheme=scheme), images, classes=texts,
        labels=images.labels if labels else None, gate=gate, recipe=recipe,
        training=training, budget=budget, epsilon=epsilon, delta=delta, seed=seed, is_timed=timed,
        folder=out / "unfinished", progress=progress,
    )  # fmt: skip
    exits.save(out)
    _line("model", f"{opened.title}, {scheme}, {'no' if texts is None else len(texts)} classes")
    _line("photos", f"{len(images.names)}; {photos.report()}")
    for key, text in tables.card_lines(exits.card):
        _line(key, text)
    _out.print(tables.of_plans(exits))
    _line("written", str(out))


@_command
def evaluate(
    data: Data,
    classes: ClassFile = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="int8, int8-patches or paper; again for more. Default: int8, paper."),
    ] = None,
    exits: Annotated[
        Path | None,
        typer.Option(exists=True, help="From `lraee calibrate`: adds its gate and the rivals."),
    ] = None,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Recall of image search at mixed depths.")
    ] = False,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos per call.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
    progress: Show = True,
) -> None:
    """Measure what quantization and early exits cost on photos, beside the float model.

    Example: `lraee evaluate --data val.zip --classes classes.json --exits exits --retrieval`
    """
    from lraee.data.classes import TEMPLATES, class_features, read_classes
    from lraee.data.photos import Photos
    from lraee.evaluation import evaluate
    from lraee.evaluation.retrieval import search_all
    from lraee.exits.bundle import Exits
    from lraee.layers.scheme import find_scheme
    from lraee.model.accelerate import accelerate
    from lraee.zoo.opening import open_model

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
    learned = None if exits is None else Exits.load(exits)
    if learned is not None:
        models |= {
            f"exits {gate}": accelerate(
                opened.model, scheme=learned.scheme, exits=learned.using(gate)
            )
            for gate in learned.names
        }
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
    if learned is not None:
        found["card"] = dict(learned.card)
    if retrieval:
        found["retrieval"] = [asdict(row) for row in search_all(embedded)]
    if out is not None:
        evaluate.write_json(found, out)
    _line("model", f"{title}, {len(names)} class names, {len(TEMPLATES)} templates")
    _line("machine", f"{found['machine']}, {found['threads']} threads, {found['operators']}")
    _line("photos", f"{found['photos']}, {found['labelled']} labelled; {photos.report()}")
    _out.print(tables.of_forms(found["rows"]))
    if retrieval:
        _out.print(tables.of_retrieval(found["retrieval"]))
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
    from lraee.evaluation import evaluate
    from lraee.measurement import machine, timing
    from lraee.model.accelerate import accelerate
    from lraee.zoo.opening import open_model

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


@_command
def selftest(
    device: Annotated[
        interpreter.Device, typer.Option(help="The interpreter takes tiny shapes, and no times.")
    ] = "cuda",
    json_out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, shorter timings.")] = False,
    progress: Show = True,
) -> None:
    """Compare every Triton kernel with its definition on this GPU, then time it beside torch.

    Example: `lraee selftest --device cuda --json-out selftest.json`
    """
    from lraee.diagnostics import selftest
    from lraee.evaluation import evaluate

    found = selftest.examine(device, quick=quick, progress=progress)
    for key in ("gpu", "capability", "driver", "versions"):
        if key in found:
            _line(key, found[key])
    for table in tables.of_selftest(found):
        _out.print(table)
    if json_out is not None:
        evaluate.write_json(found, json_out)
        _line("written", str(json_out))
    if not found["is_ok"]:
        raise typer.Exit(1)


_command(cli_report.report)
_command(cli_embed.embed)
_command(cli_merge.merge)
_command(cli_serve.serve)
_command(cli_serve.index)


def _line(key: str, text: str) -> None:
    _out.print(f"{key:<16}{text}", markup=False, soft_wrap=True)
