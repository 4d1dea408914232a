"""Rows by hand."""

import pytest
import torch

from lraee.study.rows import frontier_point, row_of_outcomes, shares_of, spread
from lraee.study.trials import Outcome


def outcome(left_at: list[int], right: list[bool], saved: float) -> Outcome:
    nothing = torch.empty(len(left_at), 0)
    return Outcome(
        (2,), torch.tensor(left_at) // 6, torch.tensor(left_at), torch.tensor(right), 0.5, saved,
        nothing, nothing, nothing, nothing,
    )  # fmt: skip


FIRST = outcome([2, 2, 6, 6], [True, False, True, True], 0.2)
SECOND = outcome([6, 6, 6, 6], [True, False, False, True], 0.1)


def test_spread() -> None:
    assert spread([0.25]) == {"mean": 25.0, "std": 0.0}
    result = spread([0.25, 0.75])
    assert result["mean"] == 50.0 and result["std"] == pytest.approx(100 * 0.5 / 2**0.5)
    with pytest.raises(ValueError, match="got none"):
        spread([])


def test_rows() -> None:
    row = row_of_outcomes("x", "int8", [FIRST, SECOND], "why")
    assert row["top1"]["mean"] == 62.5 and row["flops_saved"]["mean"] == pytest.approx(15.0)
    assert row["agreement"] == {"mean": 50.0, "std": 0.0} and row["seeds"] == 2
    assert frontier_point("x", "int8", 0.8, [FIRST, SECOND])["top1"] == row["top1"]


def test_shares_are_over_seeds() -> None:
    result = shares_of("int8", "r", [FIRST, SECOND])["exits"]
    assert [each["block"] for each in result] == [2, 6]
    assert result[0]["share"]["mean"] == 25.0
    assert result[0]["top1"] == {"mean": 50.0, "std": 0.0}  # of the one seed in which some left
    assert result[1]["share"]["mean"] == 75.0 and result[1]["top1"]["mean"] == 75.0
