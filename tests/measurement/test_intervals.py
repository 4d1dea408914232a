"""Intervals against published and hand-worked values."""

import pytest
import torch

from lraee.measurement.intervals import of_mean_share, of_share


def test_wilson() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, to four digits."""
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert of_share(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert of_share(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_a_mean_of_shares_is_its_normal_interval_within_0_and_1() -> None:
    values = torch.tensor([0.4, 0.5, 0.6])  # spread 0.1
    half = 1.96 * 0.1 / 3**0.5
    assert of_mean_share(values) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert of_mean_share(torch.tensor([0.3])) == pytest.approx((0.3, 0.3))
    least, most = of_mean_share(torch.tensor([1.0, 1.0, 0.9]))
    assert least < 0.97 and most == 1.0
    assert of_mean_share(torch.tensor([0.0, 0.1, 0.0]))[0] == 0.0
