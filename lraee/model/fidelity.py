"""Agreement of the fast tower's embeddings with the float tower's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class FidelityError(RuntimeError):
    """An accelerated tower disagrees with the float tower beyond the bound."""


@dataclass(frozen=True)
class Fidelity:
    """Agreement of two sets of embeddings of the same images; 1 is perfect in each.

    Args:
      cosine_min: the least cosine of an image's two embeddings.
      cosine_mean: their mean.
      centred: mean cosine after the mean float embedding is taken off: cosines of CLIP embeddings
        are near 1 for any two images, this one is not. 1 where there is one image.
      ranking: Spearman correlation of all pairwise similarities. 1 below three images.
    """

    cosine_min: float
    cosine_mean: float
    centred: float
    ranking: float


BOUND = Fidelity(cosine_min=0.99, cosine_mean=0.998, centred=0.98, ranking=0.98)
"""What accelerate(check=images) asks for.

On 24 crops of photos lraee-tiny has 0.9999, 0.99997, 0.99996, 0.9999 in `int8`; with its weights
cut to four bits 0.993, 0.9967, 0.996, 0.997 (tests/model/test_fidelity.py).
"""


def compare(expected: Tensor, actual: Tensor) -> Fidelity:
    """Agreement of embeddings [n, ...] of the same n images, n >= 1."""
    x, y = expected.flatten(1).double(), actual.flatten(1).double()
    n = x.shape[0]
    cosine = F.cosine_similarity(x, y)
    centre = x.mean(0)
    centred = F.cosine_similarity(x - centre, y - centre) if n > 1 else cosine.new_ones(1)
    return Fidelity(
        float(cosine.min()),
        float(cosine.mean()),
        float(centred.mean()),
        _spearman(_pairs(x), _pairs(y)) if n > 2 else 1.0,
    )


def require_fidelity(measured: Fidelity, bound: Fidelity = BOUND) -> None:
    """Raises FidelityError, with the measures, unless each measure reaches its bound."""
    for name, least in vars(bound).items():
        value = getattr(measured, name)
        if not value >= least:  # NaN is a disagreement
            raise FidelityError(
                f"accelerate: {name} must be at least {least} on the check images, got {value:.4f}"
                f" ({measured}); serve the float model, or keep layers float by"
                " Scheme(keep_float=…)"
            )


def _pairs(x: Tensor) -> Tensor:
    """Cosine similarity of each pair of rows."""
    x = F.normalize(x, dim=1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x @ x.T)[i, j]


def _spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks; NaN if either holds NaN."""
    if torch.isnan(x).any() or torch.isnan(y).any():
        return float("nan")
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
