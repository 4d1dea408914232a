"""From the cells of the dose study to the rows of its report; pure."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lraee.study import schema as study_schema
from lraee.study.dose import schema
from lraee.study.dose.cells import NOISE, RECIPES, SYSTEMS
from lraee.study.dose.schema import Cells, Estimate, Noise, Rescue, SystemRow
from lraee.study.quadrants import mcnemar
from lraee.study.rows import spread

FULL = study_schema.FULL_DEPTH


class Response:
    """The cells by backbone and dose, each over the same seeds.

    Args:
      cells: see cells.measure; "float" at dose 1 is the control of all.
      doses, seeds: of the cells.
      depth: blocks of the tower.
    """

    def __init__(
        self, cells: Cells, doses: Sequence[float], seeds: Sequence[int], depth: int
    ) -> None:
        """See the class."""
        self._cells, self.doses, self.seeds, self.depth = cells, doses, seeds, depth

    def at(self, backbone: str, dose: float) -> list[Mapping[str, Tensor]]:
        """One cell per seed; float is the same at every dose."""
        dose = 1.0 if backbone == "float" else dose
        return [self._cells[backbone, dose, seed] for seed in self.seeds]

    # Differences, photo by photo

    def right(self, backbone: str, dose: float, system: str) -> Tensor:
        """Float64 [seeds, n]: 1 where the answer is the label."""
        cells = self.at(backbone, dose)
        return torch.stack([cell[f"right {system}"].double() for cell in cells])

    def quantization_loss(self, backbone: str, dose: float) -> Estimate:
        """Top-1 of float - top-1 of the backbone, both at full depth."""
        return estimate(self.right("float", dose, FULL) - self.right(backbone, dose, FULL))

    def _margins(self, backbone: str, dose: float, recipe: str) -> Tensor:
        return self.right(backbone, dose, recipe) - self.right(backbone, dose, FULL)

    def margin(self, backbone: str, dose: float, recipe: str) -> Estimate:
        """Rescue - loss."""
        return estimate(self._margins(backbone, dose, recipe))

    def owed(self, backbone: str, dose: float, recipe: str) -> Estimate:
        """The margin - that of the same seeds' exits on the float control."""
        control = self._margins("float", dose, recipe)
        return estimate(self._margins(backbone, dose, recipe) - control)

    def mcnemar(self, backbone: str, dose: float, recipe: str) -> float:
        """P-value of the first seed."""
        cell = self.at(backbone, dose)[0]
        right, full = cell[f"right {recipe}"].bool(), cell[f"right {FULL}"].bool()
        return mcnemar(int((right & ~full).sum()), int((~right & full).sum()))

    def gap(self, backbone: str, dose: float, name: str) -> Estimate | None:
        """A comparison of two systems; None unless every seed has it."""
        cells = self.at(backbone, dose)
        rows = [cell[f"gap {name}"].double() for cell in cells if f"gap {name}" in cell]
        return estimate(torch.stack(rows)) if len(rows) == len(cells) else None

    # Rows

    def noise(self) -> list[Noise]:
        """By depth, of each quantized backbone at each dose."""
        return [self._noise(name, dose) for dose in self.doses for name in schema.QUANTIZED]

    def _noise(self, backbone: str, dose: float) -> Noise:
        cells = self.at(backbone, dose)
        fields = {
            field: torch.stack([cell[f"noise {field}"] for cell in cells]).mean(0).tolist()
            for field in NOISE
        }
        blocks: list[study_schema.NoiseRow] = [
            {"block": i + 1, **{field: fields[field][i] for field in NOISE}}  # type: ignore[typeddict-item]
            for i in range(self.depth)
        ]
        return {"dose": dose, "backbone": backbone, "blocks": blocks}

    def systems(self) -> list[SystemRow]:
        """Every system: the float control, then each backbone by dose."""
        rows = self._systems("float", 1.0)
        for dose in self.doses:
            for name in schema.QUANTIZED:
                rows += self._systems(name, dose)
        return rows

    def _systems(self, backbone: str, dose: float) -> list[SystemRow]:
        cells = self.at(backbone, dose)
        return [
            {
                "dose": dose,
                "backbone": backbone,
                "name": name,
                "top1": spread([_share(cell[f"right {name}"]) for cell in cells]),
                "agreement": spread([float(cell[f"agreement {name}"]) for cell in cells]),
                "flops_saved": spread([float(cell[f"saved {name}"]) for cell in cells]),
                "seeds": len(cells),
            }
            for name in SYSTEMS
            if all(f"right {name}" in cell for cell in cells)
        ]

    def rescue(self) -> list[Rescue]:
        """The curve: both recipes on the float control, then on each backbone by dose."""
        rows = [self._rescue("float", 1.0, recipe) for recipe in RECIPES]
        return rows + [
            self._rescue(name, dose, recipe)
            for name in schema.QUANTIZED
            for recipe in RECIPES
            for dose in self.doses
        ]

    def _rescue(self, backbone: str, dose: float, recipe: str) -> Rescue:
        cells = self.at(backbone, dose)
        right = [cell[f"right {recipe}"].bool() for cell in cells]
        full = [cell[f"right {FULL}"].bool() for cell in cells]
        exited = [cell[f"exit block {recipe}"] < self.depth for cell in cells]
        counts = [(a & b, a & ~b, ~a & b, ~a & ~b) for a, b in zip(right, full, strict=True)]
        both, rescue, loss, neither = (
            [int(each.sum()) for each in quadrant] for quadrant in zip(*counts, strict=True)
        )
        in_float = self.right("float", dose, FULL)
        return {
            "dose": dose,
            "backbone": backbone,
            "recipe": recipe,
            "quantization_loss": self.quantization_loss(backbone, dose),
            "margin": self.margin(backbone, dose, recipe),
            "owed": self.owed(backbone, dose, recipe),
            "rest": estimate(in_float - self.right(backbone, dose, recipe)),
            "both": sum(both),
            "rescue": sum(rescue),
            "loss": sum(loss),
            "neither": sum(neither),
            "mcnemar_p": [mcnemar(*pair) for pair in zip(rescue, loss, strict=True)],
            "exited_share": spread([_share(each) for each in exited]),
            "exited_top1": _share_of(right, exited),
            "stayed_top1": _share_of(right, [~each for each in exited]),
        }


def estimate(rows: Tensor) -> Estimate:
    """Mean in percent of values [seeds, n], one per photo, and its standard error.

    error^2 = variance of the photos' means over seeds / n + variance of the seeds' means / seeds:
    the luck of the photos, and that of channels, splits and heads, which one seed cannot tell.
    """
    seeds, n = rows.shape
    by_photo, by_seed = rows.mean(0), rows.mean(1)
    # As if one photo more were better and one worse: never 0 of photos that all agree
    variance = float((by_photo.square().sum() + 2.0) / (n + 2) - by_photo.mean().square())
    error = max(variance, 0.0) / n
    if seeds > 1:
        error += float(by_seed.var()) / seeds
    return {
        "value": 100.0 * float(by_photo.mean()),
        "error": 100.0 * error**0.5,
        "seeds": [100.0 * each for each in by_seed.tolist()],
    }


def _share(marks: Tensor) -> float:
    return float(marks.double().mean())


def _share_of(right: Sequence[Tensor], inside: Sequence[Tensor]) -> float | None:
    """Top-1 in percent of the photos inside, all seeds together."""
    rows = torch.cat([a[b] for a, b in zip(right, inside, strict=True)])
    return 100.0 * _share(rows) if len(rows) else None
