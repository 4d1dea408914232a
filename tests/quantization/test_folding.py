"""Scales and shifts that a norm and the rows of V take: the float function stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.ops.error_bounds import EPS32
from lraee.ops.reference import quantize_rows
from lraee.quantization.folding import Fold, no_fold, search
from tests.support import assert_same, generator


def with_outliers(M: int, K: int, seed: int = 0) -> Tensor:
    """Rows in which some channels are loud and some are off zero."""
    x = torch.randn(M, K, generator=generator(seed))
    x[:, 1] *= 30
    x[:, 4] += 20
    return x


def some_fold(K: int, seed: int = 5) -> Fold:
    source = generator(seed)
    return Fold(torch.randn(K, generator=source), torch.rand(K, generator=source) * 3 + 0.2)


def test_the_product_stays() -> None:
    K, N = 24, 10
    x, w, b = with_outliers(40, K), torch.randn(N, K), torch.randn(N)
    fold = some_fold(K)
    folded = fold.inputs(x).double() @ fold.weight(w).double().T + fold.bias(w, b).double()
    expected = x.double() @ w.double().T + b.double()
    # Each of K terms passes four roundings (shift, scale, weight, bias), of at most the size of
    # |x| |w| and |shift| |w|; the sum of the bias another K
    terms = (x.abs() + 2 * fold.shift.abs()).double() @ w.abs().double().T + b.abs().double()
    assert ((folded - expected).abs() <= (4 + K) * EPS32 * terms).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_stands_for_the_fold_that_it_says(dtype: torch.dtype) -> None:
    """gamma and beta are rounded to their type first; scale and shift follow from what they are."""
    K = 32
    gamma = (torch.rand(K, generator=generator(1)) + 0.1).to(dtype).float()
    gamma[3] = 0.0
    beta = torch.randn(K, generator=generator(2)).to(dtype).float()
    fold, new_gamma, new_beta = some_fold(K).into_norm(gamma, beta, dtype)
    assert_same(new_gamma, new_gamma.to(dtype).float())
    assert_same(new_beta, new_beta.to(dtype).float())
    torch.testing.assert_close(new_gamma * fold.scale, gamma, rtol=4 * EPS32, atol=0)
    torch.testing.assert_close(new_beta * fold.scale + fold.shift, beta, rtol=4 * EPS32, atol=1e-6)
    assert new_gamma[3] == 0
    x = torch.randn(50, K, generator=generator(3))
    before = F.layer_norm(x, (K,), gamma, beta)
    after = F.layer_norm(x, (K,), new_gamma, new_beta)
    torch.testing.assert_close(after, fold.inputs(before), rtol=1e-5, atol=1e-5)


def test_a_gamma_that_its_type_cannot_hold_stays() -> None:
    gamma, beta = torch.tensor([6e-8, 1.0]), torch.zeros(2)
    fold, new_gamma, _ = Fold(torch.zeros(2), torch.tensor([4.0, 2.0])).into_norm(
        gamma, beta, torch.float16
    )
    assert_same(new_gamma, torch.tensor([6e-8, 0.5]))
    assert fold.scale.tolist() == [1.0, 2.0]


def error(x: Tensor, w: Tensor, fold: Fold) -> float:
    inputs, weight = fold.inputs(x), fold.weight(w)
    x_q, x_scale, x_zero = quantize_rows(inputs, symmetric=False)
    x_hat = (x_q.float() - x_zero[:, None]) * x_scale[:, None]
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    w_hat = torch.round(weight / w_scale) * w_scale
    return float((x_hat @ w_hat.T - inputs @ weight.T).norm())


def test_the_search_finds_what_helps() -> None:
    x, w = with_outliers(300, 32), torch.randn(16, 32, generator=generator(4))
    fold = search(x, w, "row", may_shift=True)
    assert fold.shift[4] > 15  # the channel off zero
    assert error(x, w, fold) < 0.5 * error(x, w, no_fold(32))
    unshifted = search(x, w, "row", may_shift=False)
    assert not unshifted.shift.any()
    assert error(x, w, fold) < error(x, w, unshifted) < error(x, w, no_fold(32))


def test_a_channel_that_is_quiet_here_may_be_loud_elsewhere() -> None:
    x, w = with_outliers(300, 32), torch.randn(16, 32, generator=generator(4))
    quiet, loud = x.clone(), x.clone()
    quiet[:, 9] *= 1e-6
    fold = search(quiet, w, "row", may_shift=False)
    assert fold.scale[9] > 0.1 * fold.scale.median()
    assert error(loud, w, fold) < error(loud, w, no_fold(32))


def test_no_bias_takes_no_shift() -> None:
    assert Fold(torch.zeros(3), torch.ones(3)).bias(torch.ones(2, 3), None) is None
