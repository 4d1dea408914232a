"""What `lraee report --dose` finds, as JSON; shares, top-1 and FLOPs saved are in percent.

Differences are in points of top-1. A dose is the factor of the outlier channels; 1 is the model as
it is. Float is the same at every dose: its rows have dose 1 and stand for all.
"""

from typing import TypedDict

from lraee.storage.stages import Tensors
from lraee.study.schema import NoiseRow, Spread

SCHEMA = "lraee.dose/1"

CALIBRATED = "int8-calibrated"
QUANTIZED = ("paper", "int8", CALIBRATED)

Cells = dict[tuple[str, float, int], Tensors]
"""Backbone, dose, seed -> see cells.measure."""


class Kept(TypedDict):
    """Whether float answers the same with the dose in; error: largest ||y' - y|| / ||y||."""

    dose: float
    seed: int
    photos: int
    same_answers: int
    largest_error: float


class Estimate(TypedDict):
    """A mean over seeds and photos, its standard error, and the mean of each seed."""

    value: float
    error: float
    seeds: list[float]


class Noise(TypedDict):
    """By depth, of one backbone at one dose; rows are means over seeds."""

    dose: float
    backbone: str
    blocks: list[NoiseRow]


class SystemRow(TypedDict):
    """One system on one backbone at one dose; agreement with float at full depth."""

    dose: float
    backbone: str
    name: str
    top1: Spread
    agreement: Spread
    flops_saved: Spread
    seeds: int


class Rescue(TypedDict):
    """One recipe on one backbone at one dose: a point of the curve.

    loss: what full depth loses to quantization. margin: rescue - loss of the quadrants, whose
    counts are summed over seeds. owed: margin - margin of the float control. rest: what the
    recipe with exits still lacks of float at full depth. mcnemar_p: per seed, exact test.
    """

    dose: float
    backbone: str
    recipe: str
    quantization_loss: Estimate
    margin: Estimate
    owed: Estimate
    rest: Estimate
    both: int
    rescue: int
    loss: int
    neither: int
    mcnemar_p: list[float]
    exited_share: Spread
    exited_top1: float | None
    stayed_top1: float | None


class Verdict(TypedDict):
    """A claim at one dose: the difference that decides, its interval after Holm's correction.

    `quantization_loss` of the backbone in points; `difference` None where it was not measured.
    """

    dose: float
    quantization_loss: float
    difference: Estimate | None
    interval: tuple[float, float] | None
    holds: bool | None
    note: str


class Claim(TypedDict):
    """A claim on one backbone over all doses; `words` say in which range it holds."""

    claim: str
    backbone: str
    recipe: str
    unit: str
    verdicts: list[Verdict]
    words: str


class DoseReport(TypedDict):
    """The whole dose study."""

    schema: str
    date: str
    machine: dict[str, str]
    command: str
    model: str
    blocks: int
    seeds: list[int]
    doses: list[float]
    channels: int
    num_classes: int
    templates: int
    learned_from: int
    reported_on: int
    minutes: float
    protocol: dict[str, str]
    kept: list[Kept]
    noise: list[Noise]
    systems: list[SystemRow]
    rescue: list[Rescue]
    claims: list[Claim]
