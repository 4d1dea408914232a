"""Channel scales and shifts that cost nothing at run time: what stands before a linear takes them.

x @ W^T + b = ((x - shift) / scale) @ (W * scale)^T + (b + W @ shift): the float function stays. A
norm takes 1 / scale and shift in its affine, out_proj's input takes them in the rows of V, since
the attention of a token sums to 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.layers.scheme import Granularity
from lraee.ops.reference import quantize_rows

SEARCH_ROWS = 512
_ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SMALLEST = 1e-6
FLOOR = 0.1
"""Of the mean over channels: a channel that is quiet on these rows may be loud on others, and a
scale that makes it as loud as the rest here would widen the range of the whole row there."""


@dataclass(frozen=True)
class Fold:
    """x -> (x - shift) / scale, both float32 [K]."""

    shift: Tensor
    scale: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """What the linear meets instead of x [..., K]."""
        return (x - self.shift) / self.scale

    def weight(self, weight: Tensor) -> Tensor:
        """The linear's weight [N, K] for such inputs."""
        return weight * self.scale

    def bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Its bias [N]; weight is that of before. None stays None, where there is no shift."""
        return None if bias is None else bias + weight @ self.shift

    def into_norm(
        self, gamma: Tensor, beta: Tensor, dtype: torch.dtype
    ) -> tuple["Fold", Tensor, Tensor]:
        """The norm's new gamma and beta in their type, and the fold that they then stand for."""
        new_gamma = (gamma / self.scale).to(dtype).float()
        is_used = (new_gamma != 0) & (gamma != 0)
        scale = torch.where(is_used, gamma / torch.where(is_used, new_gamma, 1.0), self.scale)
        new_gamma = torch.where(is_used, new_gamma, 0.0)
        # A gamma that the type rounds to 0 is left as it was
        is_lost = (gamma != 0) & ~is_used
        new_gamma, scale = torch.where(is_lost, gamma, new_gamma), torch.where(is_lost, 1.0, scale)
        new_beta = ((beta - self.shift) / scale).to(dtype).float()
        return Fold(beta - new_beta * scale, scale), new_gamma, new_beta


def no_fold(K: int) -> Fold:
    """The one that changes nothing."""
    return Fold(torch.zeros(K), torch.ones(K))


def search(rows: Tensor, weight: Tensor, granularity: Granularity, *, may_shift: bool) -> Fold:
    """The shift and scale with the least squared error of the outputs, rounding to nearest.

    The error has a part of each side: of the inputs, |(x - Q(x)) @ W^T|^2, and of the weight, whose
    columns are weighed by their inputs' energy.

    Args:
      rows: float32 [M, K], inputs of the linear; statistics come of all, the errors of SEARCH_ROWS.
      weight: float32 [N, K].
      granularity: of the inputs: row or row_symmetric.
      may_shift: whether the linear has a bias, which takes the shift.
    """
    some = rows[:: max(1, len(rows) // SEARCH_ROWS)][:SEARCH_ROWS]
    N, K = weight.shape
    product = weight.T @ weight if K < N else None
    best, least = no_fold(K), torch.inf
    for fold in _candidates(rows, weight, may_shift):
        x = fold.inputs(some)
        x_q, x_scale, x_zero = quantize_rows(x, symmetric=granularity == "row_symmetric")
        wrong = ((x_q.float() - x_zero[:, None]) * x_scale[:, None] - x) * fold.scale
        if product is None:
            error = float((wrong @ weight.T).square().sum())
        else:
            error = float(((wrong @ product) * wrong).sum())
        folded = fold.weight(weight)
        w_scale = folded.abs().amax(1, keepdim=True).clamp(min=_SMALLEST) / 127
        rest = torch.round(folded / w_scale) * w_scale - folded
        error += float(rest.square().sum(0) @ x.square().sum(0))
        if error < least:
            best, least = fold, error
    return best


def _candidates(rows: Tensor, weight: Tensor, may_shift: bool) -> Iterator[Fold]:
    K = rows.shape[1]
    yield no_fold(K)
    by_weight = weight.square().mean(0).sqrt().clamp(min=_SMALLEST)
    largest_weight = weight.abs().amax(0).clamp(min=_SMALLEST)
    for shift in (torch.zeros(K), rows.mean(0)) if may_shift else (torch.zeros(K),):
        if shift.any():
            yield Fold(shift, torch.ones(K))
        x = rows - shift
        rms, largest = _floored(x.square().mean(0).sqrt()), _floored(x.abs().amax(0))
        for of_input, of_weight in ((rms, by_weight), (largest, largest_weight)):
            for alpha in _ALPHAS:
                scale = of_input.pow(alpha) / of_weight.pow(1 - alpha)
                yield Fold(shift, scale / scale.log().mean().exp())


def _floored(of_channels: Tensor) -> Tensor:
    return of_channels.clamp(min=max(_SMALLEST, FLOOR * float(of_channels.mean())))
