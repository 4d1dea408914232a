"""The paper's protocol (arXiv 2605.26415), our figures beside the published ones.

    make reproduce IMAGENET=/path/to/imagenet PRETRAINED=openai
    make reproduce DATA=train.zip VAL=val.zip CLASSES=classes.json

IMAGENET has `train` and `val`, each with one folder per wnid. Of `train`, 10 % of each class
(128,117 photos in the paper) are for the heads, 5,000 for the gates and 5,000 for thresholds.
Of `val`, 10,000 photos, evenly spread, are reported on. Five prompts per class.
The other form runs the same study with lraee-tiny; all photos of DATA are learned from.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import open_clip
import typer

from lraee.data.classes import Classes, read_classes
from lraee.data.photos import Photos
from lraee.data.sources import DataError
from lraee.study import command
from lraee.study.command import Sides
from lraee.study.page import write_report
from lraee.study.protocol import FAST, Protocol
from lraee.study.schema import MainRow, Report
from lraee.zoo.opening import ModelError, Opened, open_model

HEADS_SHARE = 0.1
GATE_PHOTOS = 5_000
REPORT_PHOTOS = 10_000
PROMPTS = 5
NOTHING_GIVEN = (
    "reproduce: IMAGENET=folder with train and val, or DATA=, VAL= and CLASSES= for lraee-tiny,"
    " must be given, got neither"
)


@dataclass(frozen=True)
class Task:
    """What to run: a model, its classes, photos, and the shares of the three splits."""

    opened: Opened
    classes: Classes
    sides: Sides
    protocol: Protocol


def split_train(names: list[str]) -> tuple[list[str], list[str]]:
    """Names for as many photos as heads learn from, and 10,000 for gates and thresholds.

    10 % of each class and the next of each, evenly; which of them go where is drawn by each seed.
    """
    by_class: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_class[Path(name).parent.name].append(name)
    heads: list[str] = []
    rest: list[list[str]] = []
    for own in by_class.values():
        count = max(1, round(HEADS_SHARE * len(own)))
        heads += own[:count]
        rest.append(own[count:])
    held_out: list[str] = []
    place = 0
    while len(held_out) < 2 * GATE_PHOTOS and any(place < len(own) for own in rest):
        held_out += [own[place] for own in rest if place < len(own)]
        place += 1
    return heads, held_out[: 2 * GATE_PHOTOS]


def imagenet(folder: Path, pretrained: str) -> Task:
    """ViT-B/32 on ImageNet.

    Raises: DataError, ModelError on what is missing.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataError(f"reproduce: IMAGENET must hold a folder {part}, got {folder}")
    opened = open_model("ViT-B-32", pretrained)  # before the photos: it fails sooner
    wnids = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    names = open_clip.IMAGENET_CLASSNAMES
    if len(wnids) != len(names):
        raise DataError(
            f"reproduce: IMAGENET/train must have {len(names)} folders, got {len(wnids)}"
        )
    classes = Classes(tuple(wnids), tuple(names))
    train = Photos(folder / "train", classes=classes)
    heads, held_out = split_train(train.names)
    learn = train.only([*heads, *held_out])
    report = Photos(folder / "val", classes=classes, limit=REPORT_PHOTOS)
    shares = (len(heads), len(held_out) / 2, len(held_out) / 2)
    total = sum(shares)
    protocol = Protocol(
        shares=(shares[0] / total, shares[1] / total, shares[2] / total), policy_report=2000
    )
    return Task(opened, classes, Sides(learn, report), protocol)


def tiny(data: Path, report: Path, classes: Path, *, limit: int | None, is_fast: bool) -> Task:
    """lraee-tiny on photos that are given."""
    known = read_classes(classes)
    sides = command.sides(data, report, known, limit=limit)
    return Task(open_model("lraee-tiny"), known, sides, FAST if is_fast else Protocol())


def beside_published(report: Report) -> list[str]:
    """One line per published system: the published figures, then ours on each backbone."""
    lines = [f"{'':<34} {'published':>16} {'paper INT8':>16} {'lraee INT8':>16} {'float':>16}"]
    for row in report["published"]:
        cells = [_cell(row)]
        for backbone in ("paper", "int8", "float"):
            own = [
                each for each in report["main"]
                if (each["name"], each["backbone"]) == (row["name"], backbone)
            ]  # fmt: skip
            cells.append(_cell(own[0]) if own else "")
        lines.append(f"{row['name']:<34} " + " ".join(f"{cell:>16}" for cell in cells))
    return lines


def _cell(row: MainRow) -> str:
    return f"{row['top1']['mean']:.2f} @ {row['flops_saved']['mean']:.1f} %"


def main(
    imagenet_folder: Annotated[Path | None, typer.Option("--imagenet")] = None,
    pretrained: str = "openai",
    data: Path | None = None,
    val: Path | None = None,
    classes: Path | None = None,
    out: Path = Path("results/reproduce"),
    limit: int | None = None,
    is_fast: Annotated[bool, typer.Option("--fast")] = False,
    progress: bool = True,
) -> None:
    """Run the protocol and print our rows beside the published ones."""
    try:
        if imagenet_folder is not None:
            task = imagenet(imagenet_folder, pretrained)
        elif data is not None and val is not None and classes is not None:
            task = tiny(data, val, classes, limit=limit, is_fast=is_fast)
        else:
            raise DataError(NOTHING_GIVEN)
        report = command.study(
            task.opened, task.classes, task.sides, work=out / "work", protocol=task.protocol,
            prompts=PROMPTS, progress=progress,
        )  # fmt: skip
    except (DataError, ModelError) as error:
        typer.echo(str(error).splitlines()[0], err=True)
        raise typer.Exit(1) from error
    written = write_report(report, out)
    typer.echo(f"{report['model']}, {report['reported_on']} photos; top-1 % @ FLOPs saved")
    for line in beside_published(report):
        typer.echo(line)
    typer.echo(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    typer.run(main)
