"""What follows from the sums over calibration rows: fit, rounding, bias."""

import pytest
import torch
from torch import Tensor

from lraee.quantization.moments import Moments
from tests.support import assert_same, generator


def rows(M: int, K: int, seed: int) -> Tensor:
    return torch.randn(M, K, generator=generator(seed)) + torch.linspace(-2, 2, K)


def moments(parts: list[tuple[Tensor, Tensor | None]]) -> Moments:
    x, target = parts[0]
    N = 4 if target is None else target.shape[1]
    sums = Moments(x.shape[1], N, has_target=target is not None)
    for each in parts:
        sums.add(*each)
    return sums


def numbers(rounded) -> Tensor:
    return rounded.w_q.float() * rounded.w_scale[:, None]


def test_the_bias_makes_the_mean_right() -> None:
    K, N = 16, 4
    w, b = torch.randn(N, K, generator=generator(1)), torch.randn(N, generator=generator(2))
    parts = [(rows(64, K, seed), rows(64, K, seed) @ w.T + b + 0.3) for seed in range(4)]
    rounded = moments(parts).result(w, b)
    x, target = (torch.cat(each) for each in zip(*parts, strict=True))
    y = x @ numbers(rounded).T + rounded.bias
    torch.testing.assert_close(y.mean(0), target.mean(0), rtol=1e-5, atol=1e-5)


def test_without_targets_the_float_weight_is_meant() -> None:
    K = 16
    w, b = torch.randn(4, K, generator=generator(1)), torch.randn(4, generator=generator(2))
    x = [rows(64, K, seed) for seed in range(4)]
    rounded = moments([(each, None) for each in x]).result(w, b)
    whole = torch.cat(x)
    mean = (whole @ numbers(rounded).T + rounded.bias - (whole @ w.T + b)).mean(0)
    assert mean.abs().max() < 1e-5
    plain = moments([(each, None) for each in x]).result(w, None)
    assert plain.bias is None


def test_a_fit_is_taken_where_it_holds_on_other_images() -> None:
    """Inputs that lost a tenth: the weight makes up for it. Targets of noise: it stays."""
    K, N = 12, 6
    w, b = torch.randn(N, K, generator=generator(3)), torch.zeros(N)
    lost = [(rows(200, K, seed) * 0.9, rows(200, K, seed) @ w.T) for seed in range(6)]
    fitted = moments(lost).result(w, b)
    x, target = (torch.cat(each) for each in zip(*lost, strict=True))
    gain = (x @ numbers(fitted).T + fitted.bias - target).norm()
    assert gain < 0.35 * (x @ w.T - target).norm()
    noise = [
        (rows(8, K, s), rows(8, K, s) @ w.T + 5 * torch.randn(8, N, generator=generator(s + 50)))
        for s in range(2)
    ]
    kept = moments(noise).result(w, b)
    step = kept.w_scale[:, None]
    assert ((numbers(kept) - w).abs() < 6 * step).all()


def test_the_same_sums_give_the_same_bits() -> None:
    K, N = 40, 8
    w, b = torch.randn(N, K, generator=generator(1)), torch.randn(N, generator=generator(2))
    parts = [(rows(64, K, seed), rows(64, K, seed) @ w.T) for seed in range(4)]
    first, second = (moments(parts).result(w, b) for _ in range(2))
    for name in ("w_q", "w_scale", "bias"):
        assert_same(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("importance", [None, torch.tensor([1.0, 0.0, 2.0, 1.0])])
def test_one_chunk_alone_is_not_fitted(importance: Tensor | None) -> None:
    """There are no other images to judge it by."""
    w, x = torch.randn(4, 8, generator=generator(1)), rows(32, 8, 0)
    rounded = moments([(x, 3 * x @ w.T)]).result(w, torch.zeros(4), importance)
    assert (numbers(rounded) - w).abs().max() < 4 * rounded.w_scale.max()


@pytest.mark.parametrize("has_class", [False, True])
def test_class_and_mean_tokens_count_once_more(has_class: bool) -> None:
    """The same sums as of rows written out: per image of 5 and 3 tokens 4 times the mean, and the
    first token if it is a class token.
    """
    K, N = 8, 3
    x, target = rows(8, K, 1), rows(8, N, 2)
    picked = torch.tensor([[True] * 5, [True, False, True, False, True]])
    sums = Moments(K, N, has_target=True, has_class=has_class)
    sums.add(x, target, picked)
    images = [slice(0, 5), slice(5, 8)]
    parts: list[tuple[Tensor, Tensor]] = [(x, target)]
    for image in images:
        parts += [(x[image].mean(0, True), target[image].mean(0, True))] * 4
        parts += [(x[image][:1], target[image][:1])] * (4 if has_class else 0)
    plain = moments([tuple(torch.cat(each) for each in zip(*parts, strict=True))])
    one, other = sums._halves[0], plain._halves[0]
    assert one.count == other.count
    for name in ("x_sum", "gram", "target_sum", "cross"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-4)
