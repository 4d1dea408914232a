"""GPTQ against its definition column by column, and the search of ranges around it."""

import pytest
import torch
from torch import Tensor

from lraee.quantization.rounding import DAMPING, RATIOS, descend, gptq, round_weight, upper_factor
from tests.support import assert_same, generator


def inputs(M: int, K: int, seed: int = 0) -> Tensor:
    """Rows with correlated columns."""
    x = torch.randn(M, K, generator=generator(seed))
    return x @ torch.randn(K, K, generator=generator(seed + 1)) / K**0.5


def gram_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def damped(gram: Tensor) -> Tensor:
    return gram + torch.eye(len(gram), dtype=torch.float64) * DAMPING * gram.diagonal().mean()


def by_definition(w: Tensor, H: Tensor, scale: float) -> list[int]:
    """Optimal brain quantization of one row in plain order: after each column the best float values
    of the columns that are left, solved anew from the normal equations, all in float64.
    """
    w, H = w.double(), damped(H)
    K = len(w)
    current, steps = w.clone(), []
    for k in range(K):
        q = int(torch.round(current[k] / scale).clamp(-127, 127))
        steps.append(q)
        current[k] = q * scale
        done, left = slice(0, k + 1), slice(k + 1, K)
        # least d H d^T over the columns that are left, d = w - current
        fixed = w[done] - current[done]
        if k + 1 < K:
            current[left] = w[left] + torch.linalg.solve(H[left, left], H[left, done] @ fixed)
    return steps


@pytest.mark.parametrize("K", [1, 2, 9, 24])
def test_gptq_is_its_definition(K: int) -> None:
    w = torch.randn(5, K, generator=generator(3))
    gram = gram_of(inputs(64, K))
    scale = w.abs().amax(1) / 7  # coarse, so that the order of errors matters
    w_q, _ = gptq(w, upper_factor(gram).float(), scale)
    expected = [by_definition(row, gram, float(s)) for row, s in zip(w, scale, strict=True)]
    assert w_q.tolist() == expected


def test_columns_over_several_blocks() -> None:
    """300 columns: two whole blocks of 128 and a part; against one column at a time."""
    K = 300
    w = torch.randn(3, K, generator=generator(5))
    U = upper_factor(gram_of(inputs(600, K))).float()
    scale = w.abs().amax(1) / 127
    w_q, loss = gptq(w, U, scale)
    rest, plain = w.double().clone(), torch.empty_like(w_q)
    for k in range(K):
        steps = torch.round(rest[:, k] / scale).clamp(-127, 127)
        plain[:, k] = steps.to(torch.int8)
        error = (rest[:, k] - steps * scale) / U[k, k].double()
        rest[:, k:] -= error[:, None] * U[k, k:].double()
    # float32 and float64 may differ where a value stands within rounding of a half step
    assert (w_q.int() - plain.int()).abs().max() <= 1
    assert (w_q != plain).float().mean() < 0.01


def test_loss_is_the_error_of_the_outputs() -> None:
    w = torch.randn(4, 20, generator=generator(7))
    gram = gram_of(inputs(80, 20))
    scale = w.abs().amax(1) / 15
    w_q, loss = gptq(w, upper_factor(gram).float(), scale)
    d = (w - w_q * scale[:, None]).double()
    expected = ((d @ damped(gram)) * d).sum(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_uncorrelated_inputs_round_to_nearest() -> None:
    w = torch.randn(6, 40, generator=generator(9))
    gram = torch.diag(torch.rand(40, generator=generator(1), dtype=torch.float64) + 0.1)
    scale = w.abs().amax(1) / 127
    w_q, _ = gptq(w, upper_factor(gram).float(), scale)
    assert_same(w_q, torch.round(w / scale[:, None]).to(torch.int8))


def test_it_beats_rounding_to_nearest() -> None:
    x = inputs(400, 96)
    w = torch.randn(32, 96, generator=generator(11))
    w_q, w_scale = round_weight(w, gram_of(x))
    nearest = w.abs().amax(1, keepdim=True) / 127
    errors = [
        (x @ (w - rounded).T).norm()
        for rounded in (w_q * w_scale[:, None], torch.round(w / nearest) * nearest)
    ]
    assert errors[0] < 0.8 * errors[1]


def loss_of(w: Tensor, gram: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    d = (w - w_q * w_scale[:, None]).double()
    return ((d @ damped(gram)) * d).sum(1)


def test_each_row_loses_less_than_by_gptq_in_any_range() -> None:
    gram = gram_of(inputs(200, 64))
    w = torch.randn(16, 64, generator=generator(13))
    w[3, 5] = 9.0  # an outlier that widens one row's range
    U = upper_factor(gram).float()
    w_q, w_scale = round_weight(w, gram)
    full = w.abs().amax(1) / 127
    least = torch.stack([gptq(w, U, full * ratio)[1] for ratio in RATIOS]).amin(0)
    loss = loss_of(w, gram, w_q, w_scale)
    assert (loss <= 1.001 * least).all() and loss.sum() < 0.9 * least.sum()


@pytest.mark.parametrize("K", [1, 9, 300])
def test_a_sweep_is_coordinate_descent(K: int) -> None:
    """Column by column in float64: the best step while the others stay."""
    w = torch.randn(4, K, generator=generator(17))
    gram = damped(gram_of(inputs(2 * K + 8, K)))
    scale = w.abs().amax(1) / 15
    start = torch.round(w / scale[:, None]).to(torch.int8)
    result = descend(w, gram.float(), start, scale)
    d = (start * scale[:, None] - w).double()
    plain = start.double()
    for k in range(K):
        best = plain[:, k] - (d @ gram[:, k]) / (gram[k, k] * scale)
        new = torch.round(best).clamp(-127, 127)
        d[:, k] += (new - plain[:, k]) * scale
        plain[:, k] = new
    # float32 and float64 may differ where a value stands within rounding of a half step
    assert (result != plain).float().mean() <= (0.01 if K > 9 else 0)
    losses = [((x * scale[:, None] - w).double() @ gram * (x * scale[:, None] - w)).sum()
              for x in (start, result)]  # fmt: skip
    assert losses[1] <= losses[0]


@pytest.mark.parametrize("kind", ["zero", "one row", "dead column"])
def test_inputs_without_full_rank(kind: str) -> None:
    K = 12
    x = {"zero": torch.zeros(4, K), "one row": inputs(1, K), "dead column": inputs(50, K)}[kind]
    if kind == "dead column":
        x[:, 3] = 0
    w = torch.randn(2, K, generator=generator(15))
    w_q, w_scale = round_weight(w, gram_of(x))
    assert torch.isfinite(w_scale).all() and (w_scale > 0).all()
    assert (w - w_q * w_scale[:, None]).abs().max() < w.abs().max()


def test_a_row_of_zeros_has_scale_one() -> None:
    w = torch.zeros(2, 8)
    w_q, w_scale = round_weight(w, gram_of(inputs(20, 8)))
    assert not w_q.any() and (w_scale > 0).all() and torch.isfinite(w_scale).all()
