"""The command `lraee calibrate`: learns early exits from photos."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.calibration.kinds import Training
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
    line,
    require_writable,
)
from lraee.exits.kinds import GateKind, Target


@command
def calibrate(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the exits; a run cut off goes on there.")],
    classes: ClassFile = None,
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="int8, int8-patches or paper: how it is quantized. [default: int8]"),
    ] = None,
    checkpoint: Checkpoint = None,
    recipe: Annotated[str, typer.Option(help="best, or paper: LRA-EE as published.")] = "best",
    target: Annotated[
        Target,
        typer.Option("--for", help="What exits keep: classes, or the nearest photo of a search."),
    ] = "classes",
    gate: Annotated[
        GateKind | None,
        typer.Option(help="What decides; agreement and static need no classes. [default: learned]"),
    ] = None,
    class_free: Annotated[
        bool,
        typer.Option(
            "--class-free", help="Gates see no class texts; for search take --for search."
        ),
    ] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="Gates and thresholds count what the folders say.")
    ] = False,
    training: Annotated[
        Training | None,
        typer.Option(help="Of the heads; labels and both need --labels. [default: the recipe's]"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Mean FLOPs over full depth's, at most. [default: 0.8; search: 0.88]"),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Instead of --budget: loss against full depth, at most.")
    ] = None,
    delta: Annotated[float, typer.Option(help="How often --epsilon may fail.")] = 0.05,
    num_exits: Annotated[
        int | None, typer.Option("--exits", help="So many exits, whatever time their probes take.")
    ] = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos per call.")] = 64,
    seed: Annotated[int, typer.Option(help="Of splits, crops and heads.")] = 0,
    timed: Annotated[
        bool, typer.Option(help="Measure here how many probes are worth their time.")
    ] = True,
    progress: Show = True,
) -> None:
    """Learn early exits from photos: heads, gates and thresholds, for `accelerate(exits=…)`.

    For search nothing is trained: minutes are seconds.

    Example: `lraee calibrate --data train.zip --classes classes.json --out exits`
    Example: `lraee calibrate --data photos.zip --for search --out exits`
    """
    from lraee.calibration.calibrate import calibrate
    from lraee.data.batches import PhotoImages
    from lraee.data.classes import read_classes
    from lraee.data.photos import Photos
    from lraee.layers.scheme import find_scheme
    from lraee.model.accelerate import accelerate
    from lraee.model.checkpoint import load
    from lraee.model.opened import require_one
    from lraee.towers.prompts import class_features
    from lraee.zoo.opening import open_model

    require_writable(out, is_folder=True)
    require_one(scheme, checkpoint)
    find_scheme(scheme or "int8")
    known = read_classes(classes) if classes else None
    if target == "search" and (classes is not None or class_free):
        raise typer.BadParameter("--for search takes no --classes and no --class-free")
    if labels and known is None:
        raise typer.BadParameter("--labels needs --classes, which names the folders")
    photos = Photos(data, classes=known, limit=limit)
    opened = open_model(model, pretrained)
    images = PhotoImages(photos, opened.with_margin, batch=batch, progress=progress)
    names = known.names if known else opened.class_names
    texts = None
    if not class_free and target == "classes":
        texts = class_features(opened.model, opened.tokenizer, names, progress=progress)
    fast = (
        accelerate(opened.model, scheme=scheme or "int8")
        if checkpoint is None
        else load(checkpoint, opened.model)
    )
    exits = calibrate(
        fast, images, target=target, classes=texts,
        labels=images.labels if labels else None, gate=gate, recipe=recipe,
        training=training, budget=budget, epsilon=epsilon, delta=delta, num_exits=num_exits,
        seed=seed, is_timed=timed, folder=out / "unfinished", progress=progress,
    )  # fmt: skip
    exits.save(out)
    form, count = _form(scheme, checkpoint), "no" if texts is None else len(texts)
    line("model", f"{opened.title}, {form}, {count} classes")
    line("photos", f"{len(images.names)}; {photos.report()}")
    for key, text in tables.card_lines(exits.card):
        line(key, text)
    console.print(tables.of_plans(exits))
    if "depths" in exits.card:
        console.print(tables.of_depths(exits.card["depths"]))
    line("written", str(out))


def _form(scheme: str | None, checkpoint: Path | None) -> str:
    return scheme or "int8" if checkpoint is None else f"checkpoint {checkpoint.name}"
