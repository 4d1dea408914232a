"""The command `lraee evaluate`: what quantization and early exits cost on photos."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lraee.cli import tables
from lraee.cli.common import (
    Checkpoint,
    ClassFile,
    Data,
    Limit,
    Model,
    Pretrained,
    Show,
    command,
    console,
    errors,
    line,
    require_writable,
)


@command
def evaluate(
    data: Data,
    classes: ClassFile = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="int8, int8-patches, int8-calibrated (needs --calibration) or paper; again for"
            " more. Default: int8, paper."
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="bfloat16, openvino (with NNCF, needs --calibration); again for more."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, help="128 photos of it calibrate; none of them in --data."),
    ] = None,
    exits: Annotated[
        Path | None,
        typer.Option(exists=True, help="From `lraee calibrate`: adds its gate and the rivals."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="int8: adds rows whose class texts are of an int8 text tower."),
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
    from lraee.data.classes import read_classes
    from lraee.data.photos import Photos
    from lraee.evaluation import evaluate, forms
    from lraee.evaluation.retrieval import search_all
    from lraee.exits.bundle import Exits
    from lraee.layers.scheme import find_scheme
    from lraee.model.accelerate import accelerate
    from lraee.model.checkpoint import load
    from lraee.model.text import require_text_scheme
    from lraee.storage.json import write_json
    from lraee.towers.prompts import TEMPLATES, class_features
    from lraee.zoo.opening import open_model

    schemes = scheme or ["int8", "paper"]
    try:
        for name in schemes:
            find_scheme(name)
        require_text_scheme(text)
        forms.require_forms(schemes, peer or [], has_photos=calibration is not None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        require_writable(out)
    known = read_classes(classes) if classes else None
    photos = Photos(data, classes=known, limit=limit)
    opened = open_model(model, pretrained)
    models = {evaluate.FLOAT: opened.model}
    images = None if calibration is None else forms.photos(calibration, opened, progress)
    models |= {name: forms.of_scheme(opened.model, name, text, images) for name in schemes}
    if checkpoint is not None:
        models["checkpoint"] = load(checkpoint, opened.model)
    models |= {name: forms.of_peer(opened.model, name, images) for name in peer or ()}
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
    by_text = {}
    for name in schemes if text else ():
        rows_of_text = class_features(
            models[name], opened.tokenizer, names, progress=progress
        ).cpu()
        by_text[f"{evaluate.FLOAT}, text {name}"] = (evaluate.FLOAT, rows_of_text)
        by_text[f"{name}, text {name}"] = (name, rows_of_text)
    if known and all(label is None for label in embedded.labels):
        errors.print(
            "lraee: no folder is named by a wnid of the classes: top-1 and top-5 are left out"
        )
    rows = evaluate.compare(embedded, models, class_rows, by_text)
    settings: dict[str, object]
    settings = {"batch": batch, "limit": limit, "classes": len(names), "templates": len(TEMPLATES)}
    settings |= {} if calibration is None else {"calibration": calibration.name}
    title = opened.title
    result = evaluate.report(rows, photos, embedded, model=title, data=data.name, **settings)
    if learned is not None:
        result["card"] = dict(learned.card)
    if retrieval:
        result["retrieval"] = [asdict(row) for row in search_all(embedded)]
    if out is not None:
        write_json(result, out)
    line("model", f"{title}, {len(names)} class names, {len(TEMPLATES)} templates")
    line("machine", f"{result['machine']}, {result['threads']} threads, {result['operators']}")
    line("photos", f"{result['photos']}, {result['labelled']} labelled; {photos.report()}")
    console.print(tables.of_forms(result["rows"]))
    if retrieval:
        console.print(tables.of_retrieval(result["retrieval"]))
    if out is not None:
        line("written", str(out))
