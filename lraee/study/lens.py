"""The lens: what the tokens after each block know, by heads and by the tower's own projection."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from lraee.calibration.head_training import BEST_HEAD, train_head
from lraee.calibration.targets import nearest
from lraee.exits.head import HeadWeights
from lraee.study.backbones import projected
from lraee.study.rows import share_of, spread
from lraee.study.schema import Lens
from lraee.study.trials import Backbone

INPUTS = ("class token", "mean", "both")


def lens(backbone: Backbone, *, steps: int, seeds: Sequence[int], progress: bool) -> list[Lens]:
    """Top-1 after each block by three heads, and by the final projection early.

    The heads differ in what they see: the class token, the mean of the patches, or both. All distil
    the float embedding without labels, with as many steps, and answer in float.
    """
    depth = backbone.model.depth
    kept = backbone.stages.get(
        f"{backbone.report.name} lens {steps} {' '.join(map(str, seeds))}",
        lambda: {
            inputs: _top1(backbone, inputs, steps=steps, seeds=seeds, progress=progress)
            for inputs in INPUTS
        },
    )
    early = early_projections(backbone)
    labels, classes = backbone.report_labels, backbone.model.classes
    rows: list[Lens] = []
    for place in range(depth):
        heads = {inputs: spread(kept[inputs][place].tolist()) for inputs in INPUTS}
        right = nearest(early[place], classes) == labels
        rows.append(
            {
                "block": place + 1,
                "class_token_head": heads["class token"],
                "ssa_head": heads["mean"],
                "best_head": heads["both"],
                "early_projection": 100.0 * share_of(right),
            }
        )
    return rows


def early_projections(backbone: Backbone) -> list[Tensor]:
    """The class token after each block, normed and projected, float32 [n, E].

    The last is the model's own embedding.
    """
    tokens = backbone.report.class_tokens()
    early = [projected(backbone.model.tower, each) for each in tokens.unbind(1)[:-1]]
    return [*early, backbone.report.view(0)["full"]]


def _top1(
    backbone: Backbone, inputs: str, *, steps: int, seeds: Sequence[int], progress: bool
) -> Tensor:
    """Of one kind of head: float64 [depth, seeds]."""
    options = replace(BEST_HEAD, steps=steps, views=0, has_class_token=inputs == "both")
    learn, report = backbone.learn.view(0), backbone.report.view(0)
    top1 = torch.zeros(backbone.model.depth, len(seeds), dtype=torch.float64)
    for place in tqdm(range(len(top1)), desc=f"lens, {inputs}", disable=not progress, leave=False):
        for column, seed in enumerate(seeds):
            head = train_head(
                input_of(learn["pooled"][:, place], inputs), learn["teacher"],
                options=options, seed=seed,
            )  # fmt: skip
            top1_at_block = answers(head, input_of(report["pooled"][:, place], inputs), backbone)
            top1[place, column] = share_of(top1_at_block == backbone.report_labels)
    return top1


def input_of(pooled: Tensor, inputs: str) -> Tensor:
    """What one kind of head takes of pooled tokens [n, 2 D]; one of INPUTS."""
    D = pooled.shape[1] // 2
    return {"class token": pooled[:, D:], "mean": pooled[:, :D], "both": pooled}[inputs]


def answers(head: HeadWeights, pooled: Tensor, backbone: Backbone) -> Tensor:
    """Nearest classes int64 [n] of a float head on its inputs [n, P]."""
    parts = [head(part.float()) for part in torch.split(pooled, 4096)]
    return nearest(torch.cat(parts), backbone.model.classes)
