"""Accuracy against FLOPs saved: LRA-EE as published, our recipe, and the rivals, over three seeds.

    python -m bench.exit_frontier TRAIN.zip REPORT.zip --classes CLASSES.json

Heads, gates and thresholds see the photos of TRAIN alone; REPORT is looked at once, at the end.
Features of TRAIN are computed once and kept in --work; each seed draws its own splits and heads.
The exits of the first seed are saved in `exits` beside --out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lraee import accelerate
from lraee.calibration.collect import Pair
from lraee.calibration.pipeline import (
    BEST,
    PAPER,
    Calibration,
    Features,
    Recipe,
    Task,
    collect_features,
    make_plans,
)
from lraee.calibration.plans import Goal
from lraee.calibration.scoring import ExitTable, run_plan
from lraee.calibration.targets import judge
from lraee.data.batches import PhotoImages
from lraee.data.classes import read_classes
from lraee.data.photos import Photos
from lraee.exits.head import HeadWeights
from lraee.measurement import machine
from lraee.model.acceleration import acceleration_of
from lraee.model.set_classes import unit_classes
from lraee.storage.stages import Stages
from lraee.study.cached_features import CachedFeatures
from lraee.towers.prompts import class_features
from lraee.zoo.opening import open_model

EPSILONS = (0.01, 0.02, 0.05)
SAVED = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
PAPER_LABELS_ONLY = replace(PAPER, head=replace(PAPER.head, training="labels"))
PAPER_DISTILLED = replace(PAPER, head=replace(PAPER.head, training="distill"))


class ExactFeatures(CachedFeatures):
    """CachedFeatures whose probes run on the tokens themselves, not on what was kept of them."""

    def probed(
        self, heads: Mapping[int, HeadWeights], rows: Tensor, *, classes: Tensor, logit_scale: float
    ) -> dict[str, Tensor]:
        """See Pair."""
        return self.pair.probed(heads, rows, classes=classes, logit_scale=logit_scale)


def frontier_of(
    name: str, features: Features, report: Pair, answers: dict[str, Tensor], task: Task,
    labels: Tensor,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one recipe and seed: each plan at each budget, on the report split."""
    rows = torch.ones(len(labels), dtype=torch.bool)
    assert task.classes is not None
    probes = report.probed(features.heads, rows, classes=task.classes, logit_scale=task.logit_scale)
    result: dict[str, ExitTable] = {
        "top1": judge(probes, answers, classes=task.classes, labels=labels),
        "agreement": judge(probes, answers, classes=task.classes, labels=None),
    }
    result["proof"] = judge(probes, answers, classes=task.classes, labels=None, is_proof=True)
    blocks = list(features.heads)
    goals = [Goal(budget=1.0 - saved) for saved in SAVED]
    if task.labels is None:
        goals += [Goal(epsilon=epsilon) for epsilon in EPSILONS]
    for goal in goals:
        try:
            plans, figures = make_plans(features, goal, task.recipe.rules)
        except ValueError as error:
            typer.echo(f"{name}: {error}", err=True)
            continue
        for gate, plan in plans.items():
            ran = {
                key: run_plan(plan, blocks, each, features.costs) for key, each in result.items()
            }
            yield {
                "recipe": name, "gate": gate, "budget": goal.budget, "epsilon": goal.epsilon,
                "exits": list(plan.blocks), "is_certified": figures[gate].get("is_certified"),
                "top1": 100 * ran["top1"].gain, "agreement": 100 * ran["agreement"].gain,
                "loss": 100 * (1.0 - ran["proof"].gain),
                "flops_saved": 100 * ran["top1"].flops_saved,
                "share": [float((ran["top1"].at == e).mean()) for e in range(len(blocks) + 1)],
            }  # fmt: skip
    for e, block in enumerate(blocks):
        gains = [100 * float(result[key].gain[:, e].mean()) for key in ("top1", "agreement")]
        yield {"recipe": name, "head": block, "top1": gains[0], "agreement": gains[1]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each recipe, gate and budget (or head)."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("recipe", "gate", "budget", "epsilon", "head"))
        groups.setdefault(key, []).append(row)
    result = []
    for (recipe, gate, budget, epsilon, head), group in groups.items():
        keys = ("top1", "agreement") if head else ("top1", "agreement", "loss", "flops_saved")
        figures = {key: [row[key] for row in group] for key in keys}
        result.append(
            {
                "recipe": recipe, "gate": gate, "budget": budget, "epsilon": epsilon,
                "head": head, "seeds": len(group),
                **{key: mean(each) for key, each in figures.items()},
                **{f"{key}_std": stdev(e) if len(e) > 1 else 0.0 for key, e in figures.items()},
            }
        )  # fmt: skip
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    """The summary as Markdown."""
    typer.echo(
        "| recipe | what | goal | FLOPs saved, % | top-1, % | as float, % | not as int8, % |\n"
        "|---|---|---|---|---|---|---|"
    )
    for row in rows:
        what = f"head after {row['head']}" if row["head"] else row["gate"]
        goal = f"budget {row['budget']:.2f}" if row["budget"] else ""
        goal = f"epsilon {row['epsilon']}" if row["epsilon"] else goal
        cells = [
            f"{row[key]:.2f} ± {row[f'{key}_std']:.2f}" if key in row else ""
            for key in ("flops_saved", "top1", "agreement", "loss")
        ]
        typer.echo(f"| {row['recipe']} | {what} | {goal} | {' | '.join(cells)} |")


def main(
    train: Path,
    report: Path,
    classes: Annotated[Path, typer.Option(exists=True)],
    out: Path = Path("results/exit_frontier.json"),
    work: Path = Path("results/exit_frontier_work"),
    seeds: int = 3,
    limit: int | None = None,
    with_variants: Annotated[bool, typer.Option(help="Also the factorial's trainings.")] = True,
) -> None:
    """Run every recipe and seed, and print the table."""
    known = read_classes(classes)
    opened = open_model("lraee-tiny")
    fast = accelerate(opened.model)
    texts = class_features(opened.model, opened.tokenizer, known.names)
    texts = unit_classes("exit_frontier", texts, texts.shape[1])
    learn = PhotoImages(Photos(train, classes=known, limit=limit), opened.with_margin)
    check = PhotoImages(Photos(report, classes=known, limit=limit), opened.with_margin)
    stages = Stages(work, {"train": train.name, "limit": limit, "photos": len(learn.names)})
    pair = Pair(opened.model, fast, learn, batch=64, progress=True)
    source = ExactFeatures(pair, name="int8 learn", teacher_name="teacher learn", stages=stages)
    unseen = Pair(opened.model, fast, check, batch=64, progress=True)
    answers = unseen.embeddings()
    recipes: dict[str, tuple[Recipe, bool]] = {"best": (BEST, False), "paper": (PAPER, True)}
    if with_variants:
        recipes |= {
            "paper, labels only": (PAPER_LABELS_ONLY, True),
            "paper, distilled": (PAPER_DISTILLED, False),
        }
    acceleration = acceleration_of(fast)
    assert acceleration is not None
    scale = float(opened.model.get_parameter("logit_scale").detach().exp())
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name, (recipe, has_labels) in recipes.items():
            labels = learn.labels if has_labels else None
            task = Task(recipe, Goal(0.8), "learned", texts, labels, scale, seed, False)
            keep = Stages(None, None).get
            features = collect_features(source, task, keep=keep, keep_head=keep)
            points = frontier_of(name, features, unseen, answers, task, check.labels)
            rows += [{"seed": seed, **row} for row in points]
            if seed == 0 and name == "best":
                Calibration(source, acceleration, task, keep).run().save(out.parent / "exits")
            typer.echo(f"seed {seed}: {name} done", err=True)
    nothing = torch.zeros(len(check.names), 0)
    full = judge(
        {"top1": nothing.long(), "embedding": nothing[..., None], "features": nothing[..., None]},
        answers, classes=texts, labels=check.labels,
    )  # fmt: skip
    table = summary(rows)
    typer.echo(f"int8 at full depth: top-1 {100 * float(full.gain[:, -1].mean()):.2f} %")
    print_table(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    header = {**machine.describe(), "photos": len(learn.names), "report_photos": len(check.names)}
    full_top1 = 100 * float(full.gain[:, -1].mean())
    content = {**header, "full_depth_top1": full_top1, "summary": table, "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
