"""Logistic regression against scikit-learn's own pipeline, and on data with nothing to fit."""

import math
import sys

import pytest
import torch
from torch import Tensor

import lraee
from lraee.calibration.gate_fitting import fit_logistic
from tests.support import assert_same, assert_within, generator


def separable(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of very different means and spreads, and noisy labels."""
    x = torch.randn(n, 3, generator=generator(seed)) * torch.tensor([1e-3, 1.0, 500.0])
    x = (x + torch.tensor([0.9, -3.0, 1e4])).float()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    p = torch.sigmoid(z @ torch.tensor([2.0, -1.0, 0.5]) + 0.3)
    return x, torch.rand(n, generator=generator(seed + 1)) < p


def test_folded_gate_predicts_what_the_standardised_one_does() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = separable(500, 0)
    w, b = fit_logistic(x, y)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    model = LogisticRegression(C=1e4, max_iter=1000).fit(scaled, y.numpy())
    expected = torch.from_numpy(model.predict_proba(scaled)[:, 1])
    result = torch.sigmoid(x.double() @ w + b)
    assert w.dtype == torch.float64 and isinstance(b, float)
    assert_within(result, expected, 1e-9)
    # The four numbers are run in float32: a constant of -20 or so and a variance of 1e4
    in_float32 = torch.sigmoid(x @ w.float() + torch.tensor(b, dtype=torch.float32))
    assert_within(in_float32, expected, 1e-4)


def test_logistic_finds_what_data_were_drawn_from() -> None:
    x, y = separable(20_000, 2)
    w, _ = fit_logistic(x, y)
    slope = w * x.double().std(0, correction=0)
    # Three standard errors of a slope on 20,000 rows, each about 1 / sqrt(n p (1 - p)) = 0.02
    assert_within(slope, torch.tensor([2.0, -1.0, 0.5]), 0.1)


def test_rows_that_are_not_finite_are_as_if_absent() -> None:
    x, y = separable(200, 3)
    expected = fit_logistic(x, y)
    bad = torch.tensor([[math.nan, 0.0, 0.0], [0.0, math.inf, 0.0], [0.0, 0.0, -math.inf]])
    result = fit_logistic(torch.cat([bad, x]), torch.cat([torch.tensor([True, False, True]), y]))
    assert_same(result[0], expected[0])
    assert result[1] == expected[1]


@pytest.mark.parametrize(("right", "n"), [(0, 9), (9, 9), (0, 0)])
def test_where_all_agree_the_gate_is_the_share(right: int, n: int) -> None:
    w, b = fit_logistic(torch.rand(n, 3, generator=generator(0)), torch.full((n,), right > 0))
    assert w.tolist() == [0.0, 0.0, 0.0]
    assert b == pytest.approx(math.log((right + 1) / (n - right + 1)))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1234.5678])
def test_a_feature_that_never_changes_has_no_weight(value: float) -> None:
    x, y = separable(77, 4)
    x[:, 1] = value
    w, b = fit_logistic(x, y)
    assert abs(float(w[1]) * value) < 1e-3
    others, constant = fit_logistic(x[:, [0, 2]], y)
    result = torch.sigmoid(x.double() @ w + b)
    expected = torch.sigmoid(x[:, [0, 2]].double() @ others + constant)
    assert_within(result, expected, 1e-3)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'lraee\[calibrate\]'"):
        fit_logistic(torch.zeros(2, 3), torch.tensor([True, False]))


def test_calibrate_says_so_before_it_runs_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setattr("lraee.calibration.calibrate.Pair", None)  # the model and its images
    model, _, _ = lraee.zoo.load("lraee-tiny")
    classes = torch.nn.functional.normalize(torch.randn(4, 256), dim=1)
    with pytest.raises(ImportError, match=r"pip install 'lraee\[calibrate\]'"):
        lraee.calibrate(model, torch.zeros(64, 3, 56, 56), classes=classes)
