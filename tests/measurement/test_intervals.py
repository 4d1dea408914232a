"""Intervals against published and hand-worked values."""

import pytest
import torch

from lraee.measurement.intervals import of_mean, of_share


def test_wilson() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, to four digits."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert of_share(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert of_share(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_mean() -> None:
    """Four values of standard deviation 2 have a standard error of 1."""
    values = torch.tensor([1.0, 1.0, 1.0, 1.0]) + torch.tensor([3**0.5, -(3**0.5)] * 2)
    assert of_mean(values) == pytest.approx((1 - 1.96, 1 + 1.96), abs=1e-4)
    assert of_mean(torch.tensor([0.3])) == pytest.approx((0.3, 0.3))
