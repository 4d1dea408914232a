"""Angles and flips of embeddings that are laid out by hand."""

import math

import pytest
import torch
from torch import Tensor

from lraee.study.drift import angle, drift

CLASSES = torch.eye(3)[:, :3]


def directions(*degrees: float) -> Tensor:
    """Unit rows in the plane of the first two classes, so many degrees from the first."""
    turns = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turns.cos(), turns.sin(), torch.zeros_like(turns)], dim=1).float()


def test_angle_is_of_directions_alone() -> None:
    x = directions(0.0, 10.0, 0.0)
    y = directions(30.0, 10.0, 180.0)
    assert angle(3 * x, 0.1 * y).tolist() == pytest.approx([30.0, 0.0, 180.0], abs=1e-5)


def test_small_angles_keep_their_digits() -> None:
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 1e-7]], dtype=torch.float64)
    assert float(angle(x, y)) == pytest.approx(math.degrees(1e-7), rel=1e-6)


def test_an_answer_flips_where_the_turn_outweighs_the_margin() -> None:
    before, after = directions(10, 20, 43, 44), directions(15, 25, 48, 39)
    result = drift([before, before], [before, after], classes=CLASSES, backbone="int8")
    assert result["angle"] == pytest.approx([0.0, 5.0], abs=1e-4)
    assert result["flipped"] == 1
    margins = [math.cos(math.radians(d)) - math.sin(math.radians(d)) for d in (10, 20, 43, 44)]
    assert result["margin_flipped"] == pytest.approx(margins[2], abs=1e-6)
    assert result["margin_kept"] == pytest.approx(sum(margins[i] for i in (0, 1, 3)) / 3, abs=1e-6)
    assert result["angle_flipped"] == pytest.approx(5.0, abs=1e-4)
    # Ratios rank 1, 2, 3, 4 and flips 0, 0, 1, 0: Pearson of the ranks is 1/sqrt(15)
    assert result["correlation"] == pytest.approx(1 / math.sqrt(15), abs=1e-6)


def test_deciles_go_from_small_margins_to_large() -> None:
    degrees = [44.0 - 2 * i for i in range(20)]
    before, after = directions(*degrees), directions(*[d + 4 for d in degrees])
    parts = drift([before], [after], classes=CLASSES, backbone="int8")["by_margin"]
    assert len(parts) == 10
    margins = [part["margin"] for part in parts]
    assert margins == sorted(margins)
    assert [part["flipped"] for part in parts] == [100.0, *[0.0] * 9]  # 44 and 42 pass 45 degrees
    assert [part["angle"] for part in parts] == pytest.approx([4.0] * 10, abs=1e-4)


def test_nothing_flips() -> None:
    x = directions(0, 10, 20)
    result = drift([x], [x], classes=CLASSES, backbone="int8")
    assert result["flipped"] == 0
    assert result["margin_flipped"] is None
    assert result["angle_flipped"] is None
    assert result["correlation"] is None
    assert len(result["by_margin"]) == 3  # parts that would be empty are left out


@pytest.mark.parametrize(
    ("before", "after", "classes", "words"),
    [
        ([], [], CLASSES, "float_embeddings must be"),
        ([torch.zeros(2, 4)], [torch.zeros(2, 4)], CLASSES, r"must be \[n, 3\] per block"),
        ([torch.zeros(2, 3)], [torch.zeros(1, 3)], CLASSES, "quantized must have shapes"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], CLASSES[:1], r"classes must be \[K >= 2, E\]"),
    ],
)
def test_shapes_are_refused_by_name(
    before: list[Tensor], after: list[Tensor], classes: Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        drift(before, after, classes=classes, backbone="int8")
