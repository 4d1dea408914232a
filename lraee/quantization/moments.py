"""Sums over calibration rows of a linear, and the weight and bias that follow from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.quantization.rounding import factor, round_weight

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
        if picked is None:
            half.add(x_hat, target, torch.ones(len(x_hat)))
            return
        counted = _Counted(picked, self._has_class)
        targets = None if target is None else counted.rows(target)
        half.add(counted.rows(x_hat), targets, counted.weights)

    def result(
        self, weight: Tensor, bias: Tensor | None, importance: Tensor | None = None
    ) -> "Rounded":
        """The int8 weight and the bias with the least error over all rows.

        To be called once: the sums are used up, which halves the memory.

        The weight is fitted to the targets by ridge regression, if that is better on the other half
        of the images; then rounded by GPTQ with the gram of the centred inputs (plain ones without
        a bias); the bias then makes the mean output right.

        Args:
          weight: float32 [N, K].
          bias: float32 [N] or None, which stays None.
          importance: float32 [N], how much an output's error counts in the choice of the ridge.
        """
        whole, weight_64 = self._halves[0], weight.double()
        start = weight_64
        is_centred = bias is not None
        for half in self._halves if is_centred else ():
            half.centre()
        ridge = self._choose_ridge(start, importance) if self.has_target else None
        whole.join(self._halves.pop(), is_centred=is_centred)
        if ridge is not None:
            start = start + whole.step(whole.left(start), ridge)
        w_q, w_scale = round_weight(start.float(), whole.gram)
        if bias is None:
            return Rounded(w_q, w_scale, None)
        exact = w_q.double() * w_scale.double()[:, None]
        x_mean = whole.x_sum / whole.count
        mean = whole.target_sum / whole.count if self.has_target else weight_64 @ x_mean + bias
        return Rounded(w_q, w_scale, (mean - exact @ x_mean).float())

    def _choose_ridge(self, weight: Tensor, importance: Tensor | None) -> float | None:
        """The one whose fit to one half has the least error on the other; None if no fit helps."""
        fit, judge = self._halves
        if not fit.count or not judge.count:
            return None
        best, least = None, 0.0
        to_fit, to_judge = fit.left(weight), judge.left(weight)
        for ridge in RIDGES:
            gain = judge.gain(to_judge, fit.step(to_fit, ridge), importance)
            if gain < least:
                best, least = ridge, gain
        return best


class _Counted:
    """Rows of one chunk of images, then what counts once more: means, and class tokens.

    Args:
      picked: which tokens of each image the rows are, bool [B, L].
      has_class: whether an image's first token is a class token.
    """

    def __init__(self, picked: Tensor, has_class: bool) -> None:
        """See the class."""
        self._image, place = picked.nonzero().T
        self._class = (place == 0).nonzero()[:, 0] if has_class else place[:0]
        B, M = len(picked), len(place)
        counts = ((1.0, M), (MEAN * M / B, B), (CLASS * M / B, len(self._class)))
        self.weights = torch.cat([torch.full((count,), weight) for weight, count in counts])

    def rows(self, rows: Tensor) -> Tensor:
        """Rows [M, K] and those that count once more, one for each of the weights."""
        sizes = torch.bincount(self._image)
        means = torch.zeros(len(sizes), rows.shape[1]).index_add_(0, self._image, rows)
        return torch.cat([rows, means / sizes[:, None], rows[self._class]])


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

    def add(self, x_hat: Tensor, target: Tensor | None, weights: Tensor) -> None:
        """Rows, each counted so many times: float32 [M]."""
        self.count += float(weights.sum(dtype=torch.float64))
        root = weights.sqrt()[:, None]
        x = x_hat * root
        self.gram += x.T @ x
        self.x_sum += (x * root).sum(0, dtype=torch.float64)
        if target is not None:
            t = target * root
            self.cross += x.T @ t
            self.target_sum += (t * root).sum(0, dtype=torch.float64)

    def centre(self) -> None:
        """Takes the means out of gram and cross, in place."""
        if self.count:
            mean = self.x_sum / self.count
            self.gram.addr_(mean, self.x_sum, alpha=-1)
            self.cross.addr_(mean, self.target_sum, alpha=-1)

    def join(self, other: "_Half", *, is_centred: bool) -> None:
        """Adds the sums of other rows, in place; centred ones, each about its own mean, become sums
        about the common mean.
        """
        if is_centred and self.count and other.count:
            x = self.x_sum / self.count - other.x_sum / other.count
            target = self.target_sum / self.count - other.target_sum / other.count
            weight = self.count * other.count / (self.count + other.count)
            self.gram.addr_(x, x, alpha=weight)
            self.cross.addr_(x, target, alpha=weight)
        self.count += other.count
        for total, part in (
            (self.x_sum, other.x_sum), (self.gram, other.gram),
            (self.target_sum, other.target_sum), (self.cross, other.cross),
        ):  # fmt: skip
            total += part

    def left(self, weight: Tensor) -> Tensor:
        """x^T (t - x w^T), what the weight leaves of the targets: [K, N]."""
        return self.cross - self.gram @ weight.T

    def step(self, left: Tensor, ridge: float) -> Tensor:
        """What ridge regression towards the weight that leaves this adds to it, [N, K]."""
        lower = factor(self.gram, ridge)
        return torch.zeros_like(left.T) if lower is None else torch.cholesky_solve(left, lower).T

    def gain(self, left: Tensor, step: Tensor, importance: Tensor | None) -> float:
        """|x (w + d)^T - t|^2 - |x w^T - t|^2 of these rows: below 0 where the step d helps."""
        each = (step.T * (self.gram @ step.T - 2 * left)).sum(0)
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
