"""The whole study of one model: every backbone's chapter, and the report that they add up to."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lraee.calibration.collect import Pair
from lraee.calibration.head_training import centred
from lraee.calibration.noise import pathological
from lraee.calibration.pipeline import NOISE_IMAGES, PAPER
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.measurement import machine
from lraee.storage.stages import Stages
from lraee.study import schema, smooth
from lraee.study.attribution import CorrectPhotos, attribute_to_quantization
from lraee.study.backbones import Model, backbone, paper_candidates
from lraee.study.baselines import Policies, smoothed_rows, spread_rows
from lraee.study.cached_features import CachedFeatures
from lraee.study.chapters import Chapter
from lraee.study.drift import drift
from lraee.study.findings import findings
from lraee.study.latency import BATCH, time_saved
from lraee.study.lens import early_projections, lens
from lraee.study.protocol import PAPER_BUDGET, Protocol
from lraee.study.published import published
from lraee.study.schema import Noise, Report
from lraee.study.trials import Backbone
from lraee.towers.families import image_size

QUANTIZED = ("int8", "paper")
SMOOTHED = "smoothed"
_SCALE_IMAGES = 256
"""Photos that SmoothQuant's scales and its alpha are taken from."""


@dataclass(frozen=True)
class Pictures:
    """Photos of one side of the study.

    Args:
      photos: where they are.
      images: preprocessed, with what the centre crop cuts off.
    """

    photos: Photos
    images: PhotoImages

    def mixed(self, most: int, size: tuple[int, int]) -> Tensor:
        """Centre crops of up to `most` images in an order drawn once, float32 [n, 3, *size]."""
        n = len(self.images.names)
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most]
        crops = self.crops(chosen.sort().values, size)
        return crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(1))]

    def crops(self, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """Centre crops of these images, rows ascending: float32 [len(rows), 3, *size]."""
        marks = torch.zeros(len(self.images.names), dtype=torch.bool)
        marks[rows] = True
        parts, start = [], 0
        for batch in self.images:
            parts.append(centred(batch[marks[start : start + len(batch)]], size))
            start += len(batch)
        return torch.cat(parts)


class Study:
    """The study; `run` gives the report.

    Args:
      model: what is looked at.
      learn: photos for heads, gates, thresholds, policies and scales, with labels.
      report: photos that nothing is chosen on, with labels.
      protocol: how it is run.
      stages: where finished work is kept.
      progress: show bars.
    """

    def __init__(
        self,
        model: Model,
        learn: Pictures,
        report: Pictures,
        *,
        protocol: Protocol,
        stages: Stages,
        progress: bool,
    ) -> None:
        """See the class."""
        self.model, self.learn, self.report = model, learn, report
        self.protocol, self._stages, self._progress = protocol, stages, progress
        self._bar = tqdm(total=0, disable=True)

    def run(self) -> Report:
        """Every backbone in turn, the float control first."""
        start = time.monotonic()
        report = self._empty()
        correct: dict[str, CorrectPhotos] = {}
        in_float: list[Tensor] = []
        policies = self._policies()
        with self._counting(_STEPS):
            for name in schema.BACKBONES:
                form = self._form(name, self.model.clip)
                chapter = Chapter(form, self.protocol)
                self._fill(report, chapter, policies)
                correct[name] = chapter.correct_photos()
                embeddings = early_projections(form)
                if name == "float":
                    in_float = embeddings
                    continue
                report["owed"] += attribute_to_quantization(correct[name], correct["float"])
                report["drift"].append(
                    drift(in_float, embeddings, classes=self.model.classes, backbone=name)
                )
                self._step(f"{name}: drift")
                report["main"] += self._smoothed(name)
        report["minutes"] = (time.monotonic() - start) / 60
        report["findings"] = findings(report)
        return report

    # Parts

    def _fill(self, report: Report, chapter: Chapter, policies: Policies) -> None:
        """All that one backbone adds, in an order that trains before it compares."""
        form, protocol = chapter.form, self.protocol
        name = form.name
        form.learn.view(0)
        self._step(f"{name}: photos")
        report["main"] += chapter.main()
        self._step(f"{name}: exits")
        report["quadrants"] += chapter.quadrants()
        report["shares"] += chapter.shares()
        report["sweeps"] += chapter.sweeps()
        report["examples"] += chapter.examples(self.report.photos, self.report.images.names)
        report["costs"] += chapter.costs(self._time_saved(chapter) if name == "int8" else None)
        self._step(f"{name}: quadrants, sweeps, costs")
        report["lens"][name] = lens(
            form, steps=protocol.lens_steps, seeds=protocol.seeds, progress=self._progress
        )
        self._step(f"{name}: lens")
        report["main"].append(policies.row(form))
        self._step(f"{name}: policy")
        if name in QUANTIZED:
            report["noise"][name] = self._noise(form)
            report["factorial"] += chapter.factorial()
            report["pruned"].append(chapter.pruned())
            self._step(f"{name}: factorial, noise")
        if name == "int8":
            report["frontier"] += chapter.frontier()
            self._step(f"{name}: frontier")

    def _noise(self, form: Backbone) -> list[Noise]:
        rows = form.learn.noise(NOISE_IMAGES)
        candidates = paper_candidates(len(rows))
        dropped = pathological({b: rows[b - 1].inr for b in candidates}, PAPER.kappa)
        return [
            {
                "block": block,
                "natural_step": row.natural_step,
                "quantization_error": row.quantization_error,
                "nsr": row.nsr,
                "mse": row.mse,
                "cosine": row.cosine,
                "max_abs": row.max_abs,
                "inr": row.inr,
                "is_candidate": block in candidates,
                "is_dropped": block in dropped,
            }
            for block, row in enumerate(rows, 1)
        ]

    def _time_saved(self, chapter: Chapter) -> float:
        trial = chapter.best[0]
        images = self.report.mixed(4 * BATCH, trial.backbone.learn.size)
        plan = trial.plan_within(self.protocol.budget)
        return time_saved(trial, plan, images, budget_s=self.protocol.timing_s)

    def _smoothed(self, name: str) -> list[schema.MainRow]:
        size = self._size
        images = self.learn.mixed(_SCALE_IMAGES, size)
        alpha = smooth.best_alpha(self.model.clip, images, scheme=name)
        clip = smooth.smoothed(self.model.clip, images, alpha=alpha)
        rows = smoothed_rows(self._form(name, clip, SMOOTHED), self.protocol, alpha)
        self._step(f"{name}: SmoothQuant")
        return rows

    def _policies(self) -> Policies:
        protocol, size = self.protocol, self._size
        return Policies(
            self.learn.mixed(protocol.policy_images, size),
            self.report.crops(
                spread_rows(len(self.report.images.names), protocol.policy_report), size
            ),
            protocol,
            progress=self._progress,
        )

    # Forms of the model

    @property
    def _size(self) -> tuple[int, int]:
        return image_size(self.model.clip)

    def _form(self, name: str, clip: nn.Module, *marks: str) -> Backbone:
        fast = backbone(clip, name)
        title = " ".join((name, *marks))
        sides = {
            side: CachedFeatures(
                Pair(
                    self.model.clip, fast, pictures.images, batch=64, progress=self._progress
                ),
                name=f"{title} {side}", teacher_name=f"teacher {side}", stages=self._stages,
            )
            for side, pictures in (("learn", self.learn), ("report", self.report))
        }  # fmt: skip
        return Backbone(
            name, self.model, sides["learn"], sides["report"], self.learn.images.labels,
            self.report.images.labels, self._stages, self.protocol.splits,
        )  # fmt: skip

    # Around

    def _empty(self) -> Report:
        facts = machine.describe()
        return {
            "schema": schema.SCHEMA,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {key: str(value) for key, value in facts.items() if key != "command"},
            "command": str(facts["command"]),
            "model": self.model.title,
            "blocks": self.model.depth,
            "seeds": list(self.protocol.seeds),
            "num_classes": len(self.model.classes),
            "templates": self.model.templates,
            "learned_from": len(self.learn.images.names),
            "reported_on": len(self.report.images.names),
            "minutes": 0.0,
            "protocol": self._protocol_text(),
            "noise": {}, "lens": {}, "main": [], "published": published(), "factorial": [],
            "sweeps": [], "pruned": [], "shares": [], "quadrants": [], "owed": [], "examples": [],
            "drift": [], "costs": [], "frontier": [], "findings": [],
        }  # fmt: skip

    def _protocol_text(self) -> dict[str, str]:
        """What was trained and chosen on what."""
        p = self.protocol
        return {
            "our recipe": f"heads on class token and patch mean, {p.steps} steps, {p.views + 1}"
            f" views of each photo, no labels; gates and thresholds for agreement with float;"
            f" budget {p.budget}",
            "as published": "heads on the patch mean, 3 epochs, labels and distillation; gates"
            f" and thresholds count labels; exits {_listed(paper_candidates(self.model.depth))};"
            f" budget {PAPER_BUDGET}, as much as the paper spends; the float control prunes none",
            "splits": ", ".join(f"{name} {100 * share:.1f} %" for name, share in p.splits.items())
            + " of the learning photos, drawn by the seed; nothing is chosen on report photos",
            "lens": f"three kinds of heads, {p.lens_steps} steps each, distilled without labels",
            "sweeps": f"{p.sweep_points} thresholds, the same at every exit",
            "policy": f"{p.policy_steps} steps on {p.policy_images} photos",
            "float control": "the accelerated tower with every linear and attention in float",
            "heads": "run in int8, as deployed, also on the float backbone",
            "FLOPs": "all tokens in every block, as the paper counts, on all backbones; time is"
            " that of the INT8 tower, whose last block computes the class token alone",
        }

    @contextmanager
    def _counting(self, steps: int) -> Iterator[None]:
        self._bar = tqdm(total=steps, desc="report", disable=not self._progress)
        with self._bar:
            yield

    def _step(self, done: str) -> None:
        self._bar.set_description(done)
        self._bar.update()


_STEPS = 5 * len(schema.BACKBONES) + 3 * len(QUANTIZED) + 1


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
