"""Sums over calibration rows of a linear, and the weight and bias that follow from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.quantization.rounding import round_weight

RIDGES = (0.01, 0.1)
"""Of the mean of the gram's diagonal: how far a fitted weight is held to the float one."""


CLASS, MEAN = 1.0, 1.0
"""How much the class token of an image, and its mean token, count beside all of its tokens."""


class Moments:
    """Sums over rows x_hat [M, K], quantized inputs, and the outputs [M, N] that they should give.

    Images go to one of two halves in turn; what the first half fits, the second judges.

    Args:
      K, N: inputs and outputs of the linear.
      has_target: whether outputs are given; else the float weight's are meant.
      has_class: whether an image's first token is a class token.
    """

    def __init__(self, K: int, N: int, *, has_target: bool, has_class: bool = False) -> None:
        self.has_target, self._has_class = has_target, has_class
        self._halves = [_Half.empty(K, N if has_target else 0) for _ in range(2)]
        self._turn = 0

    def add(
        self, x_hat: Tensor, target: Tensor | None = None, picked: Tensor | None = None
    ) -> None:
        """Rows of one chunk of images.

        Embeddings are made of class tokens and means, and attention takes means in every block. The
        error of a weight is the same for all tokens, so that no mean takes it away, as it does the
        errors of inputs. Class token and mean of an image therefore count once more, CLASS and
        MEAN times as much as its rows together.

        Args:
          x_hat: quantized inputs, float32 [M, K].
          target: outputs that they should give, float32 [M, N], or None.
          picked: which tokens of each image the rows are, bool [B, L]; None: nothing is counted
            once more.
        """
        half = self._halves[self._turn]
        self._turn = 1 - self._turn
        half.add(x_hat, target)
        if picked is None:
            return
        image, place = picked.nonzero().T
        per_image = len(x_hat) / len(picked)
        means = None if target is None else _means(target, image)
        half.add(_means(x_hat, image), means, MEAN * per_image)
        if self._has_class:
            is_class = place == 0
            classes = None if target is None else target[is_class]
            half.add(x_hat[is_class], classes, CLASS * per_image)

    def result(
        self, weight: Tensor, bias: Tensor | None, importance: Tensor | None = None
    ) -> "Rounded":
        """The int8 weight and the bias with the least error over all rows.

        The weight is fitted to the targets by ridge regression, if that is better on the other half
        of the images; then rounded by GPTQ with the gram of the centred inputs (plain ones without
        a bias); the bias then makes the mean output right.

        Args:
          weight: float32 [N, K].
          bias: float32 [N] or None, which stays None.
          importance: float32 [N], how much an output's error counts in the choice of the ridge.
        """
        is_centred = bias is not None
        whole = self._halves[0] + self._halves[1]
        start = weight.double()
        if self.has_target:
            ridge = self._choose_ridge(start, is_centred, importance)
            if ridge is not None:
                start = start + whole.centred(is_centred).step(start, ridge)
        gram = whole.centred(is_centred).gram
        fitted = start.float()
        w_q, w_scale = round_weight(fitted, gram)
        if bias is None:
            return Rounded(w_q, w_scale, None)
        exact = w_q.double() * w_scale.double()[:, None]
        x_mean = whole.x_sum / whole.count
        mean = (
            whole.target_sum / whole.count if self.has_target else weight.double() @ x_mean + bias
        )
        return Rounded(w_q, w_scale, (mean - exact @ x_mean).float())

    def _choose_ridge(
        self, weight: Tensor, is_centred: bool, importance: Tensor | None
    ) -> float | None:
        """The one whose fit to one half has the least error on the other; None if no fit helps."""
        fit, judge = (half.centred(is_centred) for half in self._halves)
        if not fit.count or not judge.count:
            return None
        best, least = None, 0.0
        for ridge in RIDGES:
            gain = judge.gain(weight, fit.step(weight, ridge), importance)
            if gain < least:
                best, least = ridge, gain
        return best


def _means(rows: Tensor, image: Tensor) -> Tensor:
    """The mean row of each image, [B, K]."""
    counts = torch.bincount(image)
    sums = torch.zeros(len(counts), rows.shape[1]).index_add_(0, image, rows)
    return sums / counts[:, None]


@dataclass
class _Half:
    """Weighted sums: rows, x, x^T x, targets, x^T target; float64."""

    count: float
    x_sum: Tensor
    gram: Tensor
    target_sum: Tensor
    cross: Tensor

    @staticmethod
    def empty(K: int, N: int) -> "_Half":
        shapes = ((K,), (K, K), (N,), (K, N))
        return _Half(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x_hat: Tensor, target: Tensor | None, weight: float = 1.0) -> None:
        """Rows, each counted so many times."""
        self.count += weight * len(x_hat)
        self.gram += weight * (x_hat.T @ x_hat)
        self.x_sum += weight * x_hat.sum(0, dtype=torch.float64)
        if target is not None:
            self.cross += weight * (x_hat.T @ target)
            self.target_sum += weight * target.sum(0, dtype=torch.float64)

    def __add__(self, other: "_Half") -> "_Half":
        return _Half(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def centred(self, is_centred: bool) -> "_Half":
        """The sums about the means; as they are where there is no bias to make up for those."""
        if not is_centred or not self.count:
            return self
        mean = self.x_sum / self.count
        gram = self.gram - torch.outer(mean, self.x_sum)
        cross = (
            self.cross - torch.outer(mean, self.target_sum) if self.cross.numel() else self.cross
        )
        return _Half(self.count, self.x_sum, gram, self.target_sum, cross)

    def step(self, weight: Tensor, ridge: float) -> Tensor:
        """What ridge regression towards the weight adds to it, [N, K]."""
        K = len(self.gram)
        damped = self.gram + torch.eye(K, dtype=torch.float64) * (
            ridge * float(self.gram.diagonal().mean()) + 1e-30
        )
        lower, info = torch.linalg.cholesky_ex(damped)
        if info:
            return torch.zeros_like(weight)
        return torch.cholesky_solve(self.cross - self.gram @ weight.T, lower).T

    def gain(self, weight: Tensor, step: Tensor, importance: Tensor | None) -> float:
        """|x (w + d)^T - t|^2 - |x w^T - t|^2 of these rows: below 0 where the step d helps."""
        moved = self.gram @ step.T
        each = (step.T * (moved + 2 * (self.gram @ weight.T - self.cross))).sum(0)
        return float(each.sum() if importance is None else each @ importance.double().square())


@dataclass(frozen=True)
class Rounded:
    """An int8 linear: w_q int8 [N, K], w_scale float32 [N], bias float32 [N] or None."""

    w_q: Tensor
    w_scale: Tensor
    bias: Tensor | None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        own = {f"{name}.w_q": self.w_q, f"{name}.w_scale": self.w_scale}
        return own if self.bias is None else own | {f"{name}.bias": self.bias}
