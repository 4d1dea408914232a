"""The paper's factorial: class token or SSA head, last block or exits, two trainings."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lraee.calibration.head_training import PAPER_HEAD, HeadOptions, Training, train_head
from lraee.exits.head import HeadWeights
from lraee.study.rows import NOTHING, share_of, spread
from lraee.study.schema import FactorialRow
from lraee.study.trials import Backbone, Outcome

LABEL_OF_TRAINING: dict[Training, str] = {
    "labels": "labels",
    "both": "labels and distillation",
    "distill": "distillation",
}


def full_depth(backbone: Backbone) -> FactorialRow:
    """(i): the class token at full depth."""
    return {
        "name": "(i) class token at full depth",
        "backbone": backbone.name,
        "top1": spread([share_of(backbone.full_top1 == backbone.report_labels)]),
        "flops_saved": NOTHING,
    }


def with_exits(
    backbone: str, numeral: str, training: Training, outcomes: Sequence[Outcome]
) -> FactorialRow:
    """(iv) and (v): the paper's exits."""
    return {
        "name": f"{numeral} exits, {LABEL_OF_TRAINING[training]}",
        "backbone": backbone,
        "top1": spread([share_of(each.right) for each in outcomes]),
        "flops_saved": spread([each.flops_saved for each in outcomes]),
    }


def last_block(
    backbone: Backbone, numeral: str, training: Training, seeds: Sequence[int]
) -> FactorialRow:
    """(ii) and (iii): the paper's head at the last block, all photos."""
    options = replace(PAPER_HEAD, training=training)
    ran = [last_head(backbone, options, seed) for seed in seeds]
    return {
        "name": f"{numeral} SSA head at the last block, {LABEL_OF_TRAINING[training]}",
        "backbone": backbone.name,
        "top1": spread([share_of(top1 == backbone.report_labels) for top1, _ in ran]),
        "flops_saved": spread([ran[-1][1]]),
    }


def last_head(backbone: Backbone, options: HeadOptions, seed: int) -> tuple[Tensor, float]:
    """A head at the last block in place of the final norm and projection.

    Returns: its answers to the report photos, int64 [n], and the share of FLOPs that it saves,
      mostly below 0.
    """
    model = backbone.model
    head = _trained(backbone, options, seed)
    probes = backbone.report.probed(
        {model.depth: head}, torch.ones(len(backbone.report_labels), dtype=torch.bool),
        classes=model.classes, logit_scale=model.logit_scale,
    )  # fmt: skip
    saved = _saved_by_last_head(backbone, head.macs + model.classes.numel())
    return probes["top1"][:, 0], saved


def _trained(backbone: Backbone, options: HeadOptions, seed: int) -> HeadWeights:
    """Trained on as many photos as the exits' heads: the same share, drawn by the seed."""
    view, n = backbone.learn.view(0), len(backbone.labels)
    source = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=source)[: round(backbone.splits["heads"] * n)]
    P = view["pooled"].shape[2] // (1 if options.has_class_token else 2)
    kind = options.training if options.training != "distill" else f"distill {options.steps}"
    trained = backbone.stages.get(
        f"{backbone.learn.name} last {kind} {len(rows)} {seed}",
        lambda: train_head(
            view["pooled"][rows, -1, :P], view["teacher"][rows], options=options, seed=seed,
            classes=backbone.model.classes, labels=backbone.labels[rows],
            logit_scale=backbone.model.logit_scale,
        ).tensors(),
    )  # fmt: skip
    return HeadWeights.of(trained)


def _saved_by_last_head(backbone: Backbone, macs: int) -> float:
    """The head and the classes in place of the final norm and projection; mostly below 0."""
    parts = backbone.parts
    return 1.0 - parts.when_leaving([len(parts.blocks)], [2 * macs])[0] / parts.total
