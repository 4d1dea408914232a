"""Rows of the dose study from its cells: differences are paired, the float control is the zero."""

import pytest
import torch

from lraee.study import schema as study_schema
from lraee.study.dose import schema
from lraee.study.dose.response import estimate
from tests.dose_cells import DOSES, PHOTOS, SEEDS, report, response

FULL, PUBLISHED = study_schema.FULL_DEPTH, study_schema.PUBLISHED


def test_an_estimate_is_the_mean_with_the_luck_of_photos_and_seeds() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    got = estimate(rows)
    assert got["value"] == pytest.approx(25.0)
    assert got["seeds"] == pytest.approx([0.0, 50.0])
    by_photo = [1.0, 0.5, 0.0, -0.5]
    variance = (sum(v * v for v in by_photo) + 2.0) / 6 - 0.25**2
    assert got["error"] == pytest.approx(100.0 * (variance / 4 + 0.125 / 2) ** 0.5)
    one = estimate(rows[:1])
    assert one["seeds"] == [0.0] and one["error"] == pytest.approx(100.0 * (4 / 6 / 4) ** 0.5)


def test_photos_that_all_agree_are_no_certainty() -> None:
    assert estimate(torch.zeros(3, 100, dtype=torch.float64))["error"] > 1.0


def test_the_float_control_is_the_zero_of_the_curve() -> None:
    for row in response().rescue():
        if row["backbone"] == "float":
            assert row["owed"]["value"] == row["quantization_loss"]["value"] == 0.0
        counts = row["both"] + row["rescue"] + row["loss"] + row["neither"]
        assert counts == PHOTOS * len(SEEDS) and len(row["mcnemar_p"]) == len(SEEDS)
        margin = 100.0 * (row["rescue"] - row["loss"]) / counts
        assert row["margin"]["value"] == pytest.approx(margin)
        rest = row["quantization_loss"]["value"] - row["margin"]["value"]
        assert row["rest"]["value"] == pytest.approx(rest)


def test_owed_is_the_margin_above_that_in_float() -> None:
    answers = response()
    for dose in DOSES:
        margins = [answers.margin(name, dose, PUBLISHED)["value"] for name in ("paper", "float")]
        owed = answers.owed("paper", dose, PUBLISHED)
        assert owed["value"] == pytest.approx(margins[0] - margins[1])
    assert answers.owed("paper", 32.0, PUBLISHED)["value"] > 10.0


def test_rows_of_every_backbone_and_dose() -> None:
    built = report()
    keys = {(row["backbone"], row["dose"]) for row in built["systems"]}
    assert keys == {("float", 1.0), *((n, d) for n in schema.QUANTIZED for d in DOSES)}
    loss = {
        row["dose"]: row["quantization_loss"]["value"]
        for row in built["rescue"] if row["backbone"] == "paper"
    }  # fmt: skip
    assert loss[1.0] < loss[8.0] < loss[32.0] and 25.0 < loss[32.0] < 40.0
    for noise in built["noise"]:
        assert [row["block"] for row in noise["blocks"]] == list(range(1, 13))
        assert noise["blocks"][0]["nsr"] == pytest.approx((1 + noise["dose"]) / 100.0)
