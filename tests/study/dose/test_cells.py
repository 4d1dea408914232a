"""One cell: every system is there, and comparisons at equal FLOPs lie on lines between plans."""

import pytest
import torch

from lraee.calibration.head_training import PAPER_HEAD
from lraee.study import schema as study_schema
from lraee.study.dose import cells
from lraee.study.dose.cells import mean_gap, measure, right_at
from lraee.study.factorial import last_head
from lraee.study.protocol import Protocol
from tests.study.small_study import SPLITS, small_form

QUICK = Protocol(
    frontier_budgets=(0.9,), views=0, steps=20, lens_steps=5, sweep_points=5,
    shares=(SPLITS["heads"], SPLITS["gate"], SPLITS["thresholds"]),
)  # fmt: skip
LOW, HIGH = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()


def test_a_line_between_two_plans() -> None:
    curve = [(0.4, HIGH), (0.0, LOW)]
    expected = {0.0: [1.0, 0.0], 0.1: [0.75, 0.25], 0.4: [0.0, 1.0]}
    for saved, chances in expected.items():
        got = right_at(curve, saved)
        assert got is not None and got.tolist() == pytest.approx(chances)
    assert right_at(curve, -0.01) is None and right_at(curve, 0.41) is None
    assert right_at([], 0.1) is None
    same = right_at([(0.2, LOW), (0.2, HIGH)], 0.2)
    assert same is not None and same.tolist() in ([1.0, 0.0], [0.0, 1.0])


def test_the_mean_gap_of_two_curves() -> None:
    better, worse = [(0.0, HIGH), (0.5, HIGH)], [(0.1, LOW), (0.3, HIGH), (0.9, HIGH)]
    gap = mean_gap(better, worse)
    # From 0.1 to 0.5 the second goes to HIGH over half of the way
    expected = sum(max(1.0 - i / 10, 0.0) for i in range(21)) / 21
    assert gap is not None and gap.tolist() == pytest.approx([-expected, expected])
    assert mean_gap(better, [(0.6, LOW), (0.9, LOW)]) is None


def test_a_quantized_form_has_systems_noise_and_comparisons() -> None:
    form = small_form("paper")
    cell = measure(form, QUICK, 0)
    n = len(form.report_labels)
    full = cell[f"right {study_schema.FULL_DEPTH}"]
    assert torch.equal(full, form.full_top1 == form.report_labels)
    for name in (*cells.RECIPES, cells.SSA_LAST, cells.OUR_LAST):
        assert cell[f"right {name}"].shape == (n,) and cell[f"right {name}"].dtype == torch.bool
        assert 0.0 <= float(cell[f"agreement {name}"]) <= 1.0
    top1, saved = last_head(form, PAPER_HEAD, 0)
    assert torch.equal(cell[f"right {cells.SSA_LAST}"], top1 == form.report_labels)
    assert float(cell[f"saved {cells.SSA_LAST}"]) == saved
    for recipe in cells.RECIPES:
        blocks = cell[f"static blocks {recipe}"]
        assert cell[f"static right {recipe}"].shape == (n, len(blocks))
        depths = set(cell[f"exit block {recipe}"].tolist())
        assert depths <= {*blocks.tolist(), form.model.depth}
    assert cell["noise nsr"].shape == (6,) and bool((cell["noise nsr"] > 0).all())
    for name in (cells.SHALLOW, cells.DISTILLED, cells.PRUNING, study_schema.STATIC):
        if f"gap {name}" in cell:
            assert float(cell[f"gap {name}"].abs().max()) <= 1.0
    assert {f"gap {name}" for name in (cells.SHALLOW, cells.DISTILLED, cells.PRUNING)} <= set(cell)


def test_the_float_control_has_systems_alone() -> None:
    cell = measure(small_form("float"), QUICK, 0)
    assert f"right {study_schema.PUBLISHED}" in cell and "noise nsr" not in cell
    assert not [name for name in cell if name.startswith("gap ")]
