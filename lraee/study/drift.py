"""How far quantization turns an embedding, and whether that is what flips an answer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.study.schema import Drift

_PARTS = 10


def drift(
    float_embeddings: Sequence[Tensor],
    quantized: Sequence[Tensor],
    *,
    classes: Tensor,
    backbone: str,
) -> Drift:
    """Angles between float and quantized embeddings; which answers flip at full depth, and why.

    The float margin of an image is the cosine of its float embedding with the nearest class less
    that with the next: a turn flips the answer where it outweighs the margin. `correlation` is
    Spearman's, of angle / margin with "flips" (0 or 1): 1 would mean that this ratio predicts the
    flipped from the kept, None that all or none flip. `by_margin` has ten parts of the images, as
    equal as may be, smallest margins first: `margin`, `angle` (means) and `flipped`, percent. The
    mean of nothing is None.

    Args:
      float_embeddings: float [n, E] after each block, the last at full depth.
      quantized: the same of the quantized tower.
      classes: unit rows float [K, E], K >= 2.
      backbone: name of schema.
    Raises: ValueError on shapes that do not fit, ImportError without scipy.
    """
    _require_fit(float_embeddings, quantized, classes)
    angles = [angle(a, b) for a, b in zip(float_embeddings, quantized, strict=True)]
    cosine, cosine_q = (
        F.normalize(each[-1].double(), dim=1) @ classes.double().T
        for each in (float_embeddings, quantized)
    )
    best = cosine.topk(2, dim=1).values
    margin, flips = best[:, 0] - best[:, 1], cosine.argmax(1) != cosine_q.argmax(1)
    return {
        "backbone": backbone,
        "angle": [float(each.mean()) for each in angles],
        "flipped": int(flips.sum()),
        "margin_flipped": _mean(margin[flips]),
        "margin_kept": _mean(margin[~flips]),
        "angle_flipped": _mean(angles[-1][flips]),
        "angle_kept": _mean(angles[-1][~flips]),
        "correlation": _correlation(angles[-1] / margin.clamp(min=1e-12), flips),
        "by_margin": _by_margin(margin, angles[-1], flips),
    }


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Degrees between rows of [n, E], float64 [n]; exact for small angles, where arccos is not."""
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return torch.rad2deg(2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1)))


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _correlation(ratio: Tensor, flips: Tensor) -> float | None:
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise ImportError(
            f"drift: scipy must be installed: pip install 'lraee[report]' ({error})"
        ) from error
    if bool(flips.all()) or not bool(flips.any()) or bool((ratio == ratio[0]).all()):
        return None
    return float(spearmanr(ratio.numpy(), flips.numpy()).statistic)


def _by_margin(margin: Tensor, angles: Tensor, flips: Tensor) -> list[dict[str, float]]:
    parts = margin.argsort(stable=True).tensor_split(_PARTS)
    return [
        {
            "margin": float(margin[rows].mean()),
            "angle": float(angles[rows].mean()),
            "flipped": 100.0 * float(flips[rows].double().mean()),
        }
        for rows in parts
        if len(rows)
    ]


def _require_fit(a: Sequence[Tensor], b: Sequence[Tensor], classes: Tensor) -> None:
    """Raises ValueError unless both are embeddings of the same images in the space of classes."""
    shapes, others = [list(each.shape) for each in a], [list(each.shape) for each in b]
    if classes.dim() != 2 or len(classes) < 2:
        raise ValueError(f"drift: classes must be [K >= 2, E], got {list(classes.shape)}")
    E = classes.shape[1]
    is_whole = all(len(shape) == 2 and shape[0] > 0 and shape[1] == E for shape in shapes)
    if not shapes or not is_whole:
        raise ValueError(f"drift: float_embeddings must be [n, {E}] per block, got {shapes}")
    if shapes != others:
        raise ValueError(f"drift: quantized must have shapes {shapes}, got {others}")
