"""The dose study: every backbone at every dose, several seeds, cell by cell."""

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lraee.calibration.collect import Pair
from lraee.model.accelerate import accelerate
from lraee.quantization.images import Calibration
from lraee.storage.stages import Stages, Tensors
from lraee.study.backbones import Model, backbone
from lraee.study.baselines import spread_rows
from lraee.study.cached_features import CachedFeatures
from lraee.study.dose import schema
from lraee.study.dose.cells import measure
from lraee.study.dose.outliers import check_float, dosed
from lraee.study.dose.protocol import Doses
from lraee.study.protocol import Protocol
from lraee.study.study import Pictures
from lraee.study.trials import Backbone
from lraee.towers.families import image_size

RECIPE = 1
"""Of what a cell holds: stages that another version left are not used."""
_CALIBRATION_IMAGES = 128
_CHECKED_PHOTOS = 512
_MOST_JOBS = 4
"""Each takes about 1 GB."""


def settings(protocol: Protocol, doses: Doses) -> dict[str, object]:
    """What a cell depends on beside model and photos; doses and seeds are in its name."""
    fields = asdict(protocol)
    for of_no_use in ("seeds", "policy_steps", "policy_images", "policy_report", "timing_s"):
        del fields[of_no_use]
    return {"dose recipe": RECIPE, "protocol": fields, "channels": doses.channels}


class DoseStudy:
    """The cells of the study; `run` gives them all.

    Args:
      model: what is looked at.
      learn: photos for heads, gates, thresholds and calibration, with labels.
      report: photos that nothing is chosen on, with labels.
      protocol: how exits are trained.
      doses: what is run.
      stages: where finished cells are kept.
      progress: show bars.
    """

    def __init__(
        self,
        model: Model,
        learn: Pictures,
        report: Pictures,
        *,
        protocol: Protocol,
        doses: Doses,
        stages: Stages,
        progress: bool,
    ) -> None:
        """See the class."""
        self.model, self.learn, self.report = model, learn, report
        self.protocol, self.doses = protocol, doses
        self._stages, self._progress = stages, progress

    def run(self) -> tuple[schema.Cells, list[schema.Kept]]:
        """The float control, then dose 1, then seed by seed: a run cut off has whole seeds.

        As many forms at once as torch has threads, four at most, each on one thread: a small tower
        gains little from more.
        """
        self._teach()
        threads, cells = torch.get_num_threads(), schema.Cells()
        jobs = min(threads, _MOST_JOBS)
        work = self._work()
        total = sum(len(part.seeds) for part in work)
        bar = tqdm(total=total, desc="dose", disable=not self._progress)
        torch.set_num_threads(1)
        try:
            with (
                bar,
                ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            ):
                for finished in pool.map(lambda part: self._run(part, bar), work):
                    cells |= finished
        finally:
            torch.set_num_threads(threads)
        kept = [
            self._kept(dose, seed)
            for dose in self.doses.scales
            if dose != 1.0
            for seed in self.doses.seeds
        ]
        return cells, kept

    def _teach(self) -> None:
        """The float model's embeddings, which all forms share, before any of them needs them."""
        for side in self._sides("teacher", self.model.clip).values():
            side.teach(0)

    def _run(self, part: "_Part", bar: Any) -> schema.Cells:
        """All cells of one form, which is not made where every cell is kept."""
        form = cache(partial(self._form, part))
        cells = schema.Cells()
        for seed in part.seeds:
            key = part.name, part.dose, seed
            cells[key] = self._stages.get(
                f"cell {part.name} dose {part.dose:g} seed {seed}",
                partial(self._measure, form, seed),
            )
            bar.set_description(f"{part.name}, dose {part.dose:g}, seed {seed}")
            bar.update()
        return cells

    def _measure(self, form: Callable[[], Backbone], seed: int) -> Tensors:
        start = time.monotonic()
        tensors = measure(form(), self.protocol, seed)
        seconds = torch.tensor(time.monotonic() - start, dtype=torch.float64)
        return tensors | {"seconds": seconds}

    def _work(self) -> list["_Part"]:
        seeds, names = self.doses.seeds, schema.QUANTIZED
        work = [_Part("float", 1.0, seeds[0], seeds)]
        if 1.0 in self.doses.scales:
            work += [_Part(name, 1.0, seeds[0], seeds) for name in names]
        return work + [
            _Part(name, dose, seed, (seed,))
            for seed in seeds
            for dose in self.doses.scales
            if dose != 1.0
            for name in names
        ]

    # Forms of the model

    def _clip(self, dose: float, seed: int) -> nn.Module:
        if dose == 1.0:
            return self.model.clip
        return dosed(self.model.clip, dose, channels=self.doses.channels, seed=seed)

    def _form(self, part: "_Part") -> Backbone:
        fast = self._fast(part.name, self._clip(part.dose, part.channels_seed))
        sides = self._sides(part.name, fast)
        return Backbone(
            part.name, self.model, sides["learn"], sides["report"], self.learn.images.labels,
            self.report.images.labels, _TeacherAlone(self._stages), self.protocol.splits,
        )  # fmt: skip

    def _sides(self, name: str, fast: nn.Module) -> dict[str, CachedFeatures]:
        # A teacher of its own: what watches one tower must not see what runs beside it
        teacher, stages = copy.deepcopy(self.model.clip), _TeacherAlone(self._stages)
        return {
            side: CachedFeatures(
                Pair(teacher, fast, pictures.images, batch=64, progress=False),
                name=f"{name} {side}", teacher_name=f"teacher {side}", stages=stages,
            )
            for side, pictures in (("learn", self.learn), ("report", self.report))
        }  # fmt: skip

    def _fast(self, name: str, clip: nn.Module) -> nn.Module:
        if name != schema.CALIBRATED:
            return backbone(clip, name)
        images = self.learn.mixed(_CALIBRATION_IMAGES, image_size(self.model.clip))
        return accelerate(clip, calibration=Calibration(images, progress=False))

    def _kept(self, dose: float, seed: int) -> schema.Kept:
        """What float does with the dose in."""

        def make() -> Tensors:
            size = image_size(self.model.clip)
            rows = spread_rows(len(self.report.images.names), _CHECKED_PHOTOS)
            check = check_float(
                self.model.clip, self._clip(dose, seed), self.report.crops(rows, size),
                self.model.classes,
            )  # fmt: skip
            return {key: torch.tensor(value) for key, value in asdict(check).items()}

        tensors = self._stages.get(f"float dose {dose:g} seed {seed}", make)
        return {
            "dose": dose,
            "seed": seed,
            "photos": int(tensors["photos"]),
            "same_answers": int(tensors["same_answers"]),
            "largest_error": float(tensors["largest_error"]),
        }


@dataclass(frozen=True)
class _Part:
    """One form of the model, and the seeds of splits and heads that share it."""

    name: str
    dose: float
    channels_seed: int
    seeds: tuple[int, ...]


class _TeacherAlone(Stages):
    """Keeps what all doses share, the float model's embeddings; the rest is too large to keep."""

    def __init__(self, kept: Stages) -> None:
        super().__init__(None, None)
        self._kept = kept

    def get(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """See Stages."""
        return self._kept.get(name, make) if name.startswith("teacher ") else make()
