"""Rescue analysis against cases counted by hand and textbook formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lraee.study.quadrants import mcnemar, owed, paired_interval, quadrants

NAMES = ("ant", "bee", "cat")


def marks(text: str) -> Tensor:
    return torch.tensor([letter == "1" for letter in text])


FULL = marks("11110000")
SEEDS = [marks("11101100"), marks("11111000")]
LEFT = marks("11001100")
SCORES = torch.tensor(
    [[0.9, 0.2, math.nan, 0.1, 0.8, 0.4, 0.3, math.nan], [0.5] * 8], dtype=torch.float32
).T
RIGHT_AT_EXIT = torch.stack([marks("10110101"), marks("11111111")], dim=1)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def study(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "right_with": SEEDS, "right_full": FULL, "has_exited": LEFT, "gate_scores": SCORES,
        "right_at_exit": RIGHT_AT_EXIT, "exits": (8, 10), "labels": LABELS, "class_names": NAMES,
        "backbone": "int8", "recipe": "LRA-EE as published",
    }  # fmt: skip
    arguments |= changes
    return quadrants(arguments.pop("right_with"), arguments.pop("right_full"), **arguments)


def test_counts_are_sums_over_seeds() -> None:
    result = study()
    assert (result["both"], result["rescue"], result["loss"], result["neither"]) == (7, 3, 1, 5)
    assert result["images"] == 16
    assert result["margin"] == {"mean": 12.5, "std": 0.0}


def test_margin_spreads_over_seeds() -> None:
    result = study(right_with=[marks("11111100"), FULL])  # +25 and 0 points
    assert result["margin"]["mean"] == 12.5
    assert result["margin"]["std"] == pytest.approx(25 / math.sqrt(2))


def test_selectivity_is_of_the_first_seed() -> None:
    result = study()
    assert result["left_share"] == 50.0
    assert result["left_top1"] == 100.0
    assert result["stayed_top1"] == 25.0
    assert study(has_exited=marks("00000000"))["left_top1"] is None
    assert study(has_exited=marks("11111111"))["stayed_top1"] is None


def test_auroc_counts_pairs_and_leaves_out_what_agrees_or_was_not_probed() -> None:
    # Exit 8: right 0.9, 0.1, 0.4; wrong 0.2, 0.8, 0.3; right above wrong in 3 + 0 + 2 of 9 pairs
    assert study()["auroc"] == {"8": pytest.approx(5 / 9)}


def test_classes_come_by_rescued_less_lost() -> None:
    assert study()["classes"] == [
        {"name": "cat", "rescued": 1, "lost": 0},
        {"name": "bee", "rescued": 1, "lost": 1},
    ]


def test_mcnemar_is_the_binomial_tail() -> None:
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(8, 2) == pytest.approx(2 * tail)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert study()["mcnemar_p"] == 1.0  # 2 and 1 of 3


def test_interval_is_that_of_a_mean() -> None:
    """With thousands of images the bootstrap agrees with the normal interval of the mean."""
    difference = torch.tensor([1.0] * 300 + [-1.0] * 200 + [0.0] * 4500)
    low, high = paired_interval(difference)
    reach = 196 * float(difference.double().std()) / math.sqrt(5000)
    assert low == pytest.approx(2.0 - reach, abs=0.05)
    assert high == pytest.approx(2.0 + reach, abs=0.05)
    assert (low, high) == paired_interval(difference[torch.randperm(5000)])


def test_interval_of_no_difference_is_zero() -> None:
    assert paired_interval(torch.zeros(9)) == (0.0, 0.0)


def test_owed_is_the_margin_above_float() -> None:
    result = owed(SEEDS, FULL, [FULL], FULL, backbone="int8", recipe="r")
    assert (result["margin"], result["float_margin"], result["difference"]) == (12.5, 0.0, 12.5)
    assert result["interval"][0] <= 12.5 <= result["interval"][1]
    same = owed(SEEDS, FULL, SEEDS, FULL, backbone="int8", recipe="r")
    assert same["difference"] == 0.0
    assert same["interval"] == (0.0, 0.0)  # paired: the same images, nothing left to chance


def test_owed_pairs_images() -> None:
    """The interval is of the difference image by image, narrower than that of either margin."""
    right = torch.rand(1000) < 0.3
    full = torch.rand(1000) < 0.3
    mine = right.clone()
    mine[:10] = ~full[:10]
    result = owed([mine], full, [right], full, backbone="int8", recipe="r")
    low, high = paired_interval(mine.double() - full.double())
    assert result["interval"][1] - result["interval"][0] < (high - low) / 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"right_with": []}, "right_with must be bool"),
        ({"right_with": [FULL[:3]]}, r"right_with must be bool \[n\] = \[8\]"),
        ({"has_exited": LEFT[:3]}, r"has_exited must be \[8\], got \[3\]"),
        ({"gate_scores": SCORES[:, :1]}, r"gate_scores must be \[8, 2\], got \[8, 1\]"),
        ({"exits": (8,)}, r"gate_scores must be \[8, 1\]"),
        ({"labels": LABELS[:2]}, r"labels must be \[8\]"),
    ],
)
def test_shapes_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        study(**changes)


def test_owed_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="float_right_full must have shape"):
        owed(SEEDS, FULL, [FULL[:4]], FULL[:4], backbone="int8", recipe="r")
