"""What `lraee report` finds, as JSON; shares, top-1, agreement and FLOPs saved are in percent.

A backbone is "float" (the control), "int8" or "paper"; depths count blocks from 1. Labels decide
top-1; agreement is with the float model at full depth.
"""

from typing import TypedDict

SCHEMA = "lraee.report/1"

BACKBONES = ("float", "int8", "paper")

# Names of systems: of rows in `main`, `costs` and `frontier`; the two recipes are also a `recipe`.
FULL_DEPTH = "full depth"
PUBLISHED = "LRA-EE as published"
BEST = "LRA-EE, our recipe"
CLASS_TOKEN = "class-token exits"
PABEE = "PABEE"
CONFIDENCE = "confidence only"
STATIC = "best static exit"
ADAPTIVE = "AdaViT-style policy"
SMOOTHED = "full depth + SmoothQuant"
SMOOTHED_EXITS = "LRA-EE as published + SmoothQuant"


class Spread(TypedDict):
    """Mean and standard deviation over seeds (sample; 0 of one seed)."""

    mean: float
    std: float


class NoiseRow(TypedDict):
    """One block; see calibration.noise.BlockNoise."""

    block: int
    natural_step: float
    quantization_error: float
    nsr: float
    mse: float
    cosine: float
    max_abs: float
    inr: float


class Noise(NoiseRow):
    """One block, and whether pathological pruning drops it."""

    is_candidate: bool
    is_dropped: bool


class Lens(TypedDict):
    """Top-1 that one block's tokens give: by trained heads, and by its own projection."""

    block: int
    class_token_head: Spread
    ssa_head: Spread
    best_head: Spread
    early_projection: float


class MainRow(TypedDict):
    """One system of the main table; `seeds` 1 and std 0 where nothing is random.

    Published rows have no agreement.
    """

    name: str
    backbone: str
    top1: Spread
    agreement: Spread | None
    flops_saved: Spread
    seeds: int
    note: str


class FactorialRow(TypedDict):
    """(i) to (v) of the paper's factorial; the name begins with that numeral in brackets."""

    name: str
    backbone: str
    top1: Spread
    flops_saved: Spread


class SweepPoint(TypedDict):
    """One threshold, the same at every exit, of one gate; means over seeds."""

    threshold: float
    flops_saved: float
    top1: float
    agreement: float


class Sweep(TypedDict):
    """Learned and confidence gate on the same heads, over the whole threshold sweep."""

    backbone: str
    recipe: str
    learned: list[SweepPoint]
    confidence: list[SweepPoint]


class Pruned(TypedDict):
    """The same recipe with one more exit, the one of lowest INR, kept or left out."""

    backbone: str
    block: int
    inr_share_of_mean: float
    is_dropped_by_rule: bool
    kept: MainRow
    left_out: MainRow


class ExitShare(TypedDict):
    """Share of images that exit after a block; the last is full depth."""

    block: int
    share: Spread
    top1: Spread


class Shares(TypedDict):
    """Exit shares of one recipe."""

    backbone: str
    recipe: str
    exits: list[ExitShare]


class ClassRescue(TypedDict):
    """Images of one class that exits rescue and lose."""

    name: str
    rescued: int
    lost: int


class Quadrants(TypedDict):
    """(right with exits, right at full depth), summed over seeds; the rest for the first seed.

    margin = rescue - loss in points of top-1, interval its 95 % interval (paired, by bootstrap over
    images of the first seed), mcnemar_p of the exact test. Selectivity: top-1 of those that exited
    early and of those that stayed. AUROC: of the gate's score for "this exit's answer is right".
    """

    backbone: str
    recipe: str
    images: int
    both: int
    rescue: int
    loss: int
    neither: int
    margin: Spread
    interval: tuple[float, float]
    mcnemar_p: float
    left_share: float
    left_top1: float | None
    stayed_top1: float | None
    auroc: dict[str, float]
    classes: list[ClassRescue]


class Owed(TypedDict):
    """How much of the rescue is owed to quantization: margin on a backbone - margin on float."""

    backbone: str
    recipe: str
    margin: float
    float_margin: float
    difference: float
    interval: tuple[float, float]


class Answer(TypedDict):
    """What one exit, or full depth (block = number of blocks), answers for a photo."""

    block: int
    name: str
    probability: float
    is_taken: bool


class Example(TypedDict):
    """A rescued or lost photo; jpeg is base64."""

    kind: str
    backbone: str
    label: str
    jpeg: str
    answers: list[Answer]


class Drift(TypedDict):
    """Angle in degrees between float and quantized class-token embeddings (final norm, projection).

    Margin: cosine with the nearest class - with the next, in float; correlation: Spearman's of
    angle / margin with "top-1 flips"; by_margin: ten equal parts of the images, smallest margins
    first, each with mean `margin`, mean `angle` and `flipped` in percent. Means of nothing: None.
    """

    backbone: str
    angle: list[float]
    flipped: int
    margin_flipped: float | None
    margin_kept: float | None
    angle_flipped: float | None
    angle_kept: float | None
    correlation: float | None
    by_margin: list[dict[str, float]]


class Cost(TypedDict):
    """What a recipe saves; time is of batches of 32, all forms taking turns."""

    name: str
    backbone: str
    flops_saved: float
    time_saved: float | None
    head_share: float


class FrontierPoint(TypedDict):
    """One plan at one budget; mean over seeds."""

    name: str
    backbone: str
    budget: float
    flops_saved: Spread
    top1: Spread
    agreement: Spread


class Finding(TypedDict):
    """A claim of the paper beside our data; `holds` None where they are inconclusive."""

    claim: str
    holds: bool | None
    words: str


class Report(TypedDict):
    """The whole study; `protocol` says in words what was trained and chosen on what."""

    schema: str
    made: str
    machine: dict[str, str]
    command: str
    model: str
    blocks: int
    seeds: list[int]
    num_classes: int
    templates: int
    learned_from: int
    reported_on: int
    minutes: float
    protocol: dict[str, str]
    noise: dict[str, list[Noise]]
    lens: dict[str, list[Lens]]
    main: list[MainRow]
    published: list[MainRow]
    factorial: list[FactorialRow]
    sweeps: list[Sweep]
    pruned: list[Pruned]
    shares: list[Shares]
    quadrants: list[Quadrants]
    owed: list[Owed]
    examples: list[Example]
    drift: list[Drift]
    costs: list[Cost]
    frontier: list[FrontierPoint]
    findings: list[Finding]
