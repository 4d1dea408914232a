"""Training of exit heads: pooled tokens of the frozen int8 tower -> the float tower's embedding.

Without labels by default. What the choices in BEST_HEAD rest on: bench/NOTES.md, "exit heads".
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lraee.calibration.kinds import Training as Training
from lraee.exits.head import HeadWeights

_log = logging.getLogger("lraee")

HeadKind = Literal["affine", "mlp"]
Schedule = Literal["constant", "cosine"]

_WARM_UP = 0.1
"""Share of the steps in which the schedule "cosine" rises to the full learning rate."""
_ROWS = 4096
"""Rows read at once where all are read: float32 copies stay small beside the float16 inputs."""


def _require(
    holds: bool, argument: str, rule: str, value: object, *, of: str = "HeadOptions"
) -> None:
    if not holds:
        raise ValueError(f"{of}: {argument} must {rule}, got {value!r}")


def _words(choices: object) -> str:
    return ", ".join(map(repr, get_args(choices)))


@dataclass(frozen=True)
class HeadOptions:
    """What a head is and how it is trained.

    Args:
      kind: "mlp" = W2 gelu(W1 x + b1) + b2, "affine" = W1 x + b1.
      hidden: rows of W1 in an "mlp"; None = D, the tower's width, as in the paper.
      has_class_token: the head takes the class token beside the mean of the patches.
      training: "distill" = cosine to the teacher's embedding, and its class distribution where
        `distribution_weight` > 0; "labels" = cross-entropy; "both" = their sum.
      steps, epochs: mini-batches in all, or passes over all rows; exactly one of them is given.
      batch: rows of a mini-batch.
      learning_rate, schedule: constant, or 10 % linear rise and then half a cosine down to 0.
      weight_decay: AdamW's, on matrices only; 0 is Adam.
      distribution_weight: factor of KL(teacher's classes || head's classes) in distillation.
      views: augmented views of each photo to train on beside its centre crop.
    """

    kind: HeadKind = "mlp"
    hidden: int | None = None
    has_class_token: bool = True
    training: Training = "distill"
    steps: int | None = None
    epochs: int | None = None
    batch: int = 256
    learning_rate: float = 4e-3
    schedule: Schedule = "cosine"
    weight_decay: float = 1.0
    distribution_weight: float = 0.0
    views: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be trained."""
        for name, choices in (("kind", HeadKind), ("training", Training), ("schedule", Schedule)):
            value = getattr(self, name)
            _require(value in get_args(choices), name, f"be one of {_words(choices)}", value)
        _require((self.steps is None) != (self.epochs is None), "steps", _EITHER, self.steps)
        for name, least in (("hidden", 1), ("steps", 1), ("epochs", 1), ("batch", 1), ("views", 0)):
            count = getattr(self, name)
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= least
            is_absent = count is None and name in ("hidden", "steps", "epochs")
            _require(is_count or is_absent, name, f"be a whole number of at least {least}", count)
        for name in ("learning_rate", "weight_decay", "distribution_weight"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            _require(is_number, name, "be a finite number of at least 0", value)
        _require(self.learning_rate > 0, "learning_rate", "be above 0", self.learning_rate)


_EITHER = "be given where epochs is not, and only there"

PAPER_HEAD = HeadOptions(
    has_class_token=False,
    training="both",
    epochs=3,
    batch=64,
    learning_rate=5e-4,
    schedule="constant",
    weight_decay=0.0,
)
"""arXiv 2605.26415: patch mean alone, MLP D -> D -> E, Adam, cross-entropy + cosine embedding."""

BEST_HEAD = HeadOptions(hidden=512, steps=3000, views=3)
"""What did best on lraee-tiny without labels; see bench/NOTES.md.

Twice the hidden values add 0.1 to 1 point of agreement, and twice the weights that a probe reads at
batch 1; there a second exit, which adds more, is the better use of time.
"""


def train_head(
    pooled: Tensor,
    teacher: Tensor,
    *,
    options: HeadOptions,
    seed: int,
    classes: Tensor | None = None,
    labels: Tensor | None = None,
    logit_scale: float = 100.0,
    progress: bool = False,
) -> HeadWeights:
    """The head that turns pooled tokens into the teacher's embedding, or finds the labels.

    Its embeddings are as long as the teacher's on average. The same inputs, seed and number of
    threads give the same bits. Rows with NaN or Inf, and those whose teacher is 0, are left out.

    Args:
      pooled: float16 or float32 [n, P], the int8 tower's tokens after the exit's block; see
        `lraee.exits.head.pool`. A photo's views are rows of their own.
      teacher: [n, E], the float tower's embedding of the same crop, of any length.
      classes: float32 [K, E], rows of length 1. Without them distillation is the cosine alone.
      labels: int64 [n], -1 where unknown; needed, like classes, by "labels" and "both".
      logit_scale: factor of the cosine in class distributions, already exponentiated.
      progress: show a bar.
    Returns: float32 weights on pooled's device.
    Raises: ValueError on shapes that do not fit, missing labels, or no row to learn from.
    """
    _require_fit(pooled, teacher, options, classes, labels)
    source = torch.Generator().manual_seed(seed)
    rows = _usable(pooled, teacher, labels if options.training == "labels" else None)
    steps = options.steps or (options.epochs or 1) * math.ceil(len(rows) / options.batch)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(pooled.device.type, enabled=False),
    ):
        head = _initial(pooled.shape[1], teacher.shape[1], options, source, pooled.device)
        # Copies: tensors made under inference_mode cannot take part in a backward pass.
        loss = _Loss(options, None if classes is None else classes.float().clone(), logit_scale)
        optimizer = _optimizer(head, options)
        batches = islice(_batches(len(rows), options.batch, source), steps)
        bar = tqdm(batches, total=steps, desc="head", disable=not progress, leave=False)
        for step, chosen in enumerate(bar):
            picked = rows[chosen.to(rows.device)]
            target = F.normalize(teacher[picked].float(), dim=1)
            y = F.normalize(head.folded()(pooled[picked].float()), dim=1)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _rate(step, steps, options.schedule)
            optimizer.zero_grad()
            loss(y, target, None if labels is None else labels[picked]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    trained = HeadWeights.of({name: tensor.detach() for name, tensor in head.tensors().items()})
    return _as_long_as(teacher, trained, pooled, rows)


@dataclass(frozen=True)
class _Loss:
    """The loss of unit embeddings y [B, E] against unit teachers and labels."""

    options: HeadOptions
    classes: Tensor | None
    logit_scale: float

    def __call__(self, y: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Mean over the batch; labels of -1 do not count."""
        total = y.new_zeros(())
        if self.options.training != "labels":
            total = total + (1 - (y * teacher).sum(1)).mean()
        if self.classes is None:
            return total
        log_p = F.log_softmax(self.logit_scale * y @ self.classes.T, dim=1)
        if self.options.training != "labels" and self.options.distribution_weight > 0:
            log_t = F.log_softmax(self.logit_scale * teacher @ self.classes.T, dim=1)
            divergence = F.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
            total = total + self.options.distribution_weight * divergence
        if self.options.training != "distill" and labels is not None:
            known = int((labels >= 0).sum())
            nll = F.nll_loss(log_p, labels, ignore_index=-1, reduction="sum")
            total = total + nll / max(known, 1)
        return total


def _initial(
    P: int, E: int, options: HeadOptions, source: torch.Generator, device: torch.device
) -> HeadWeights:
    """A head before training: uniform in +-1 / sqrt(inputs), as torch.nn.Linear starts."""

    def uniform(*shape: int, inputs: int) -> Tensor:
        drawn = torch.rand(*shape, generator=source, dtype=torch.float32) * 2 - 1
        return (drawn / math.sqrt(inputs)).to(device).requires_grad_()

    gamma = torch.ones(P, dtype=torch.float32, device=device).requires_grad_()
    beta = torch.zeros(P, dtype=torch.float32, device=device).requires_grad_()
    if options.kind == "affine":
        return HeadWeights(gamma, beta, uniform(E, P, inputs=P), uniform(E, inputs=P))
    H = options.hidden or (P // 2 if options.has_class_token else P)
    w1, b1 = uniform(H, P, inputs=P), uniform(H, inputs=P)
    return HeadWeights(gamma, beta, w1, b1, uniform(E, H, inputs=H), uniform(E, inputs=H))


def _optimizer(head: HeadWeights, options: HeadOptions) -> torch.optim.Optimizer:
    tensors = list(head.tensors().values())
    groups = [
        {"params": [w for w in tensors if w.ndim == 2], "weight_decay": options.weight_decay},
        {"params": [v for v in tensors if v.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def _rate(step: int, steps: int, schedule: Schedule) -> float:
    """Factor of the learning rate."""
    if schedule == "constant":
        return 1.0
    rise = _WARM_UP * steps
    if step < rise:
        return min(1.0, (step + 1) / rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def _batches(n: int, batch: int, source: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, every row once in each pass, in another order each time."""
    while True:
        yield from torch.split(torch.randperm(n, generator=source), batch)


def _usable(pooled: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """Numbers of the rows to learn from; `labels` where only labelled rows teach anything."""
    length = _lengths(teacher)
    is_usable = torch.cat([rows.isfinite().all(1) for rows in torch.split(pooled, _ROWS)])
    is_usable &= length.isfinite() & (length > 0)
    left_out = int((~is_usable).sum())
    if left_out:
        _log.warning("train_head: %d of %d rows are not finite; left out", left_out, len(pooled))
    if labels is not None:
        is_usable &= labels >= 0
    _require(bool(is_usable.any()), "pooled", "have a usable row", len(pooled), of="train_head")
    return is_usable.nonzero()[:, 0]


def _lengths(rows: Tensor) -> Tensor:
    return torch.cat([part.float().norm(dim=1) for part in torch.split(rows, _ROWS)])


def _as_long_as(teacher: Tensor, head: HeadWeights, pooled: Tensor, rows: Tensor) -> HeadWeights:
    """The head with its mean embedding length made the teacher's, over the rows learned from."""
    with torch.no_grad():
        wanted = _lengths(teacher[rows]).double().mean()
        parts = [_lengths(head(pooled[part].float())) for part in torch.split(rows, _ROWS)]
        return head.scaled(float(wanted / torch.cat(parts).double().mean()))


def augmented(images: Tensor, *, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random crop of each image, flipped half the time, resized to `size` (bicubic).

    A crop holds 40 to 100 % of the image's area at an aspect of 3:4 to 4:3 of the image's own and
    lies inside it; values stay within the image's own range. There is no low-pass filter: images
    should be at most 1.5 x `size`, as preprocessed photos are.

    Args:
      images: preprocessed, float [B, 3, H, W].
      generator: source of the crops, on the CPU or on the images' device.
    Returns: [B, 3, *size] of images' dtype.
    """
    if not len(images):
        return images.new_empty(0, 3, *size)

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(images), generator=generator, device=generator.device)
        return (low + (high - low) * drawn).to(images.device)

    area, aspect = uniform(*_AREA), uniform(-1.0, 1.0).mul(math.log(4 / 3)).exp()
    # Half-extents of the crop in affine_grid's coordinates, where the image spans -1 to 1
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = torch.where(uniform(0.0, 1.0) < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1.0, 1.0) * (1 - width)
    theta[:, 1, 2] = uniform(-1.0, 1.0) * (1 - height)
    grid = F.affine_grid(theta, [len(images), 3, *size], align_corners=False)
    y = F.grid_sample(
        images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    low, high = images.float().flatten(2).aminmax(dim=2)
    return y.clamp(low[..., None, None], high[..., None, None]).to(images.dtype)


_AREA = (0.4, 1.0)
"""Smallest and largest share of an image that a crop holds."""


def centred(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle [B, 3, *size] of images at least as large; they themselves where equal."""
    H, W = images.shape[-2:]
    fits = size[0] <= H and size[1] <= W
    _require(fits, "images", f"be at least {size[0]} x {size[1]}", f"{H} x {W}", of="centred")
    top, left = (H - size[0]) // 2, (W - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def _require_fit(
    pooled: Tensor,
    teacher: Tensor,
    options: HeadOptions,
    classes: Tensor | None,
    labels: Tensor | None,
) -> None:
    n, E = len(pooled), teacher.shape[-1]

    def require(holds: bool, name: str, rule: str, value: object) -> None:
        _require(holds, name, rule, value, of="train_head")

    require(pooled.ndim == 2, "pooled", "have shape [n, P]", list(pooled.shape))
    require(teacher.ndim == 2 and len(teacher) == n, "teacher", f"have shape [n, E] with n = {n}",
            list(teacher.shape))  # fmt: skip
    is_even = pooled.shape[1] % 2 == 0 or not options.has_class_token
    require(is_even, "pooled", "hold mean and class token, 2 D values", pooled.shape[1])
    if options.training != "distill":
        need = f"be given for training {options.training!r}"
        require(classes is not None, "classes", need, None)
        require(labels is not None, "labels", need, None)
    if classes is not None:
        is_table = classes.ndim == 2 and classes.shape[1] == E
        require(is_table, "classes", f"have shape [K, {E}]", list(classes.shape))
    if labels is not None:
        require(labels.shape == (n,), "labels", f"have shape [{n}]", list(labels.shape))
        require(labels.dtype == torch.int64, "labels", "be int64", labels.dtype)
        if classes is not None and n:
            K, most = len(classes), int(labels.max())
            require(most < K and int(labels.min()) >= -1, "labels", f"be -1 to {K - 1}", most)
