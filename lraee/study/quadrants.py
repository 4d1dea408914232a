"""Rescue analysis: what exits make right and wrong that full depth has the other way round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lraee.study.schema import ClassRescue, Owed, Quadrants, Spread

_DRAWS = 20_000
_MISSING = "quadrants: {} must be installed: pip install 'lraee[report]' ({})"


def quadrants(
    right_with: Sequence[Tensor],
    right_full: Tensor,
    *,
    has_exited: Tensor,
    gate_scores: Tensor,
    right_at_exit: Tensor,
    exits: Sequence[int],
    labels: Tensor,
    class_names: Sequence[str],
    backbone: str,
    recipe: str,
) -> Quadrants:
    """Four quadrants over (right with exits, right at full depth), and their statistics.

    Counts are summed over seeds, and so is `images`; rescue margin = rescue - loss, in points of
    each seed's images. Everything else is of the first seed: a percentile bootstrap over images
    (95 %), the exact McNemar test (two-sided binomial on the images that differ), selectivity,
    AUROC of each exit over the images it probed (an exit where all of them agree is left out), and
    the classes with a rescued or lost image, by rescued - lost.

    Args:
      right_with: bool [n] per seed, whether the answer with exits is right.
      right_full: bool [n], the same at full depth.
      has_exited: bool [n], first seed: exited before full depth.
      gate_scores: float [n, m], first seed; NaN where an image was not probed.
      right_at_exit: bool [n, m], first seed: whether the exit's own answer is right.
      exits: m depths.
      labels: int64 [n], indices of class_names.
      class_names: K words.
      backbone, recipe: names of schema.
    Raises: ValueError on shapes that do not fit, ImportError without scipy or scikit-learn.
    """
    per_seed = _per_seed("right_with", right_with, right_full)
    _require_fit(right_full, has_exited, gate_scores, right_at_exit, exits, labels)
    counts = [_Counts.of(each, right_full) for each in per_seed]
    first = per_seed[0]
    return {
        "backbone": backbone,
        "recipe": recipe,
        "images": len(right_full) * len(per_seed),
        "both": sum(c.both for c in counts),
        "rescue": sum(c.rescue for c in counts),
        "loss": sum(c.loss for c in counts),
        "neither": sum(c.neither for c in counts),
        "margin": _spread([c.margin for c in counts]),
        "interval": paired_interval(_difference(first, right_full)),
        "mcnemar_p": mcnemar(counts[0].rescue, counts[0].loss),
        "left_share": _percent(has_exited) or 0.0,
        "left_top1": _percent(first[has_exited]),
        "stayed_top1": _percent(first[~has_exited]),
        "auroc": _auroc(gate_scores, right_at_exit, exits),
        "classes": _by_class(first, right_full, labels, class_names),
    }


def owed(
    right_with: Sequence[Tensor],
    right_full: Tensor,
    float_right_with: Sequence[Tensor],
    float_right_full: Tensor,
    *,
    backbone: str,
    recipe: str,
) -> Owed:
    """Rescue margin on a backbone - rescue margin on float, of the same images, in points.

    What is above 0 is owed to quantization: overthinking alone rescues in float too. Margins are
    means over seeds; the interval is a paired percentile bootstrap over images (95 %).

    Args:
      right_with: bool [n] per seed, whether the answer with exits is right on the backbone.
      right_full: bool [n], the same at full depth.
      float_right_with, float_right_full: the same on the float backbone.
      backbone, recipe: names of schema.
    Raises: ValueError on shapes that do not fit.
    """
    learned = _difference(_per_seed("right_with", right_with, right_full), right_full)
    float_seeds = _per_seed("float_right_with", float_right_with, float_right_full)
    control = _difference(float_seeds, float_right_full)
    if learned.shape[-1] != control.shape[-1]:
        raise ValueError(
            f"owed: float_right_full must have shape [n] = [{learned.shape[-1]}],"
            f" got {list(float_right_full.shape)}"
        )
    learned, control = learned.mean(0), control.mean(0)
    return {
        "backbone": backbone,
        "recipe": recipe,
        "margin": 100.0 * float(learned.mean()),
        "float_margin": 100.0 * float(control.mean()),
        "difference": 100.0 * float((learned - control).mean()),
        "interval": paired_interval(learned - control),
    }


def paired_interval(
    difference: Tensor, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of 100 x mean difference over images.

    Few values occur, so resampling images is drawing how often each value occurs: a multinomial.

    Args:
      difference: float [n], one value per image.
      level: share of the draws inside.
      seed: of the 20,000 draws.
    """
    values, counts = np.unique(difference.double().numpy().round(12), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=_DRAWS)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(100.0 * (draws @ values) / n, (tail, 100.0 - tail))
    return float(low), float(high)


def mcnemar(rescue: int, loss: int) -> float:
    """P-value of the exact two-sided McNemar test; 1 where nothing differs.

    Raises: ImportError without scipy.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise ImportError(_MISSING.format("scipy", error)) from error
    return float(binomtest(rescue, rescue + loss).pvalue) if rescue + loss else 1.0


@dataclass(frozen=True)
class _Counts:
    """The quadrants of one seed."""

    both: int
    rescue: int
    loss: int
    neither: int

    @classmethod
    def of(cls, right: Tensor, right_full: Tensor) -> "_Counts":
        masks = (right & right_full, right & ~right_full, ~right & right_full, ~right & ~right_full)
        return cls(*(int(mask.sum()) for mask in masks))

    @property
    def margin(self) -> float:
        """Rescue - loss in points of top-1."""
        images = self.both + self.rescue + self.loss + self.neither
        return 100.0 * (self.rescue - self.loss) / images


def _difference(right: Tensor, right_full: Tensor) -> Tensor:
    """1 where rescued, -1 where lost: float64 of the shape of `right`."""
    return right.double() - right_full.double()


def _percent(marks: Tensor) -> float | None:
    return 100.0 * float(marks.double().mean()) if len(marks) else None


def _spread(values: list[float]) -> Spread:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std}


def _auroc(scores: Tensor, right: Tensor, exits: Sequence[int]) -> dict[str, float]:
    """Exit -> chance that the gate scores a right answer above a wrong one, where both occur."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(_MISSING.format("scikit-learn", error)) from error
    auroc = {}
    for block, score, is_right in zip(exits, scores.T, right.T, strict=True):
        probed = score.isfinite()
        if 0 < int(is_right[probed].sum()) < int(probed.sum()):
            auroc[str(block)] = float(
                roc_auc_score(is_right[probed].numpy(), score[probed].numpy())
            )
    return auroc


def _by_class(
    right: Tensor, right_full: Tensor, labels: Tensor, names: Sequence[str]
) -> list[ClassRescue]:
    rescued = torch.bincount(labels[right & ~right_full], minlength=len(names)).tolist()
    lost = torch.bincount(labels[~right & right_full], minlength=len(names)).tolist()
    rows: list[ClassRescue] = [
        {"name": name, "rescued": up, "lost": down}
        for name, up, down in zip(names, rescued, lost, strict=True)
        if up or down
    ]
    return sorted(rows, key=lambda row: (row["lost"] - row["rescued"], row["name"]))


def _per_seed(name: str, right: Sequence[Tensor], full: Tensor) -> Tensor:
    """Bool [seeds, n]."""
    shapes = [list(each.shape) for each in right]
    if not shapes or not len(full) or any(shape != [len(full)] for shape in shapes):
        raise ValueError(
            f"quadrants: {name} must be bool [n] = [{len(full)}] per seed, one seed and image at"
            f" least, got {shapes}"
        )
    return torch.stack(list(right)).bool()


def _require_fit(
    full: Tensor,
    has_exited: Tensor,
    scores: Tensor,
    right: Tensor,
    exits: Sequence[int],
    labels: Tensor,
) -> None:
    """Raises ValueError unless all are of the same images and exits."""
    n, m = len(full), len(exits)
    for name, tensor, shape in (
        ("has_exited", has_exited, [n]),
        ("gate_scores", scores, [n, m]),
        ("right_at_exit", right, [n, m]),
        ("labels", labels, [n]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"quadrants: {name} must be {shape}, got {list(tensor.shape)}")
