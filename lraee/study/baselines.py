"""Baselines that need towers or policies of their own: SmoothQuant, and the AdaViT-style policy."""

import torch
from torch import Tensor

from lraee.calibration.targets import nearest
from lraee.study import adaptive, schema
from lraee.study.chapters import Chapter
from lraee.study.protocol import Protocol
from lraee.study.rows import row_of_full_depth, row_of_outcomes, share_of, spread
from lraee.study.schema import MainRow
from lraee.study.trials import Backbone


def spread_rows(n: int, most: int | None) -> Tensor:
    """Up to `most` of n rows, evenly spread, ascending: int64."""
    count = n if most is None else min(most, n)
    return torch.arange(count) * n // max(count, 1)


class Policies:
    """The policies of all seeds, trained once on the float model and run on every backbone.

    Args:
      images: that policies learn from, float32 [n, 3, H, W] of the tower's size.
      report: the same of the report photos that spread_rows names.
      protocol: seeds, budget and steps.
      progress: show bars.
    """

    def __init__(
        self, images: Tensor, report: Tensor, protocol: Protocol, *, progress: bool
    ) -> None:
        """See the class."""
        self._images, self._report = images, report
        self._protocol, self._progress = protocol, progress
        self._trained: dict[int, adaptive.Policy] = {}

    def row(self, form: Backbone) -> MainRow:
        """The main table's row on one backbone."""
        ran = [self._ran(form, seed) for seed in self._protocol.seeds]
        rows = spread_rows(len(form.report_labels), self._protocol.policy_report)
        labels, in_float = form.report_labels[rows], form.float_top1[rows]
        top1 = [nearest(each["embedding"], form.model.classes) for each in ran]
        return {
            "name": schema.ADAPTIVE,
            "backbone": form.name,
            "top1": spread([share_of(each == labels) for each in top1]),
            "agreement": spread([share_of(each == in_float) for each in top1]),
            "flops_saved": spread([float(each["flops_saved"]) for each in ran]),
            "seeds": len(ran),
            "note": f"keeps {self._protocol.budget} of the FLOPs, {self._protocol.policy_steps}"
            f" steps on {len(self._images)} photos in float, labels unseen;"
            f" run on {len(rows)} photos, one by one",
        }

    def _ran(self, form: Backbone, seed: int) -> dict[str, Tensor]:
        steps = self._protocol.policy_steps
        return form.stages.get(
            f"{form.report.name} policy {steps} {len(self._images)} {len(self._report)} {seed}",
            lambda: self._run(form, seed),
        )

    def _run(self, form: Backbone, seed: int) -> dict[str, Tensor]:
        policy = self._policy(form, seed)
        embedding, saved = adaptive.run_policy(form.report.fast, policy, self._report)
        return {"embedding": embedding, "flops_saved": torch.tensor(saved, dtype=torch.float64)}

    def _policy(self, form: Backbone, seed: int) -> adaptive.Policy:
        if seed not in self._trained:
            self._trained[seed] = adaptive.train_policy(
                form.model.clip, self._images,
                classes=form.model.classes, keep=self._protocol.budget,
                steps=self._protocol.policy_steps, seed=seed, progress=self._progress,
            )  # fmt: skip
        return self._trained[seed]


def smoothed_rows(form: Backbone, protocol: Protocol, alpha: float) -> list[MainRow]:
    """SmoothQuant at full depth, and under the exits as published.

    Args:
      form: the smoothed backbone, under the name of the one that it stands beside.
      protocol: seeds and recipe.
      alpha: for the note.
    """
    note = f"alpha {alpha}, chosen on photos that exits learn from"
    outcomes = Chapter(form, protocol).published_outcomes
    return [
        row_of_full_depth(schema.SMOOTHED, form.name, form, note),
        row_of_outcomes(schema.SMOOTHED_EXITS, form.name, outcomes, note),
    ]
