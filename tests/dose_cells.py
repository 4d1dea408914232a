"""Made-up cells of a dose study: random photos whose answers get worse with the dose."""

from functools import cache

import torch
from torch import Tensor

from lraee.storage.stages import Tensors
from lraee.study import schema as study_schema
from lraee.study.dose import cells, schema
from lraee.study.dose.claims import claims
from lraee.study.dose.response import Response
from lraee.study.dose.schema import DoseReport

DOSES, SEEDS, BLOCKS, PHOTOS = (1.0, 8.0, 32.0), (0, 1, 2), 12, 3000
LOST = {"float": 0.0, "int8-calibrated": 0.05, "int8": 0.2, "paper": 1.0}
"""Points lost at full depth per unit of dose; exits win half of it back."""


def cell(backbone: str, dose: float, seed: int) -> Tensors:
    source = torch.Generator().manual_seed(seed + 100)
    luck = torch.rand(PHOTOS, generator=torch.Generator().manual_seed(7))
    lost = LOST[backbone] * dose / 100.0
    tensors: Tensors = {}
    for place, name in enumerate(cells.SYSTEMS):
        share = 0.6 - (lost if name == study_schema.FULL_DEPTH else lost / 2 + place / 400)
        noise = 0.02 * torch.randn(PHOTOS, generator=source)
        tensors[f"right {name}"] = luck + noise < share
        tensors[f"agreement {name}"] = torch.tensor(1.0 - lost, dtype=torch.float64)
        tensors[f"saved {name}"] = torch.tensor(place / 40, dtype=torch.float64)
    for recipe in cells.RECIPES:
        tensors[f"exit block {recipe}"] = torch.where(luck < 0.4, 8, BLOCKS)
        tensors[f"static blocks {recipe}"] = torch.tensor([8, 10])
        tensors[f"static right {recipe}"] = torch.stack([luck < 0.4, luck < 0.5], 1)
    if backbone == "float":
        return tensors
    depth = torch.arange(1, BLOCKS + 1, dtype=torch.float64)
    tensors |= {f"noise {field}": (1 + dose * depth) / 100.0 for field in cells.NOISE}
    names = (cells.SHALLOW, cells.GATE, cells.DISTILLED, study_schema.PABEE, cells.PRUNING)
    tensors |= {f"gap {name}": _gap(place, source) for place, name in enumerate(names)}
    return tensors | {"is dropped": torch.tensor(dose > 8.0)}


def _gap(place: int, source: torch.Generator) -> Tensor:
    return (torch.rand(PHOTOS, generator=source) < 0.05 * place).float()


@cache
def response() -> Response:
    keys = [("float", 1.0), *((name, dose) for name in schema.QUANTIZED for dose in DOSES)]
    built = {(name, dose, seed): cell(name, dose, seed) for name, dose in keys for seed in SEEDS}
    return Response(built, DOSES, SEEDS, BLOCKS)


@cache
def _report() -> DoseReport:
    answers = response()
    return {
        "schema": schema.SCHEMA,
        "date": "2026-11-30",
        "machine": {"cpu": "a made-up CPU"},
        "command": "lraee report --dose 1,8,32",
        "model": "made-up",
        "blocks": BLOCKS,
        "seeds": list(SEEDS),
        "doses": list(DOSES),
        "channels": 4,
        "num_classes": 20,
        "templates": 5,
        "learned_from": 20_000,
        "reported_on": PHOTOS,
        "minutes": 80.5,
        "protocol": {"dose": "made up"},
        "kept": [
            {"dose": 8.0, "seed": 0, "photos": 512, "same_answers": 512, "largest_error": 0.0}
        ],
        "noise": answers.noise(),
        "systems": answers.systems(),
        "rescue": answers.rescue(),
        "claims": claims(answers),
    }


def report() -> DoseReport:
    return _report().copy()
