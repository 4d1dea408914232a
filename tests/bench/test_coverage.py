"""bench.coverage: the page's rows, and each check on a small tower."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bench import coverage
from bench.coverage import Row
from bench.coverage_cases import LIBRARIES, Case, cut, stir
from tests.towers.timm_models import FAMILIES, SIZE, make_trunk


def case(family: str, name: str = "small", **options: object) -> Case:
    def build(depth: int | None) -> nn.Module:
        trunk = make_trunk(family)
        cut(trunk, depth)
        return trunk

    return Case("timm", family, name, build, (SIZE, SIZE), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_towers_of_every_structure_are_supported(family: str) -> None:
    row = coverage.examine(case(family), 2)
    assert row.reason is None
    assert row.error is not None and 0 < row.error < 0.06


@pytest.mark.parametrize("family", ["clip", "eva02"])
def test_calibrated_is_compared_with_int8(family: str) -> None:
    row = coverage.examine(case(family), 2, is_calibrated=True)
    assert row.reason is None
    assert row.error is not None and 0 < row.error < 1


def test_every_library_lists_its_models_once() -> None:
    for name, cases in LIBRARIES.items():
        listed = [each.name for each in cases()]
        assert len(listed) == len(set(listed)) >= 25, name
    tags = [tag for each in LIBRARIES["open_clip"]() for tag in each.tags]
    assert len(tags) == 196


def test_the_page_counts_tags_of_supported_models(tmp_path: Path) -> None:
    rows = [
        Row("open_clip", "ViT", "a", ("x", "y"), None, 0.02),
        Row("open_clip", "ViT", "b", (), None, 0.03),
        Row("open_clip", "ResNet", "c", ("z",), "it is convolutional", None),
    ]
    assert coverage.counts(rows)["open_clip"] == {
        "models": 3, "supported": 2, "tags": 3, "supported_tags": 2,
    }  # fmt: skip
    page = coverage.page(rows, 2)
    assert "open_clip: 2 of 3 models, 2 of 3 pretrained tags." in page
    assert "| open_clip | ViT | `a`, `b` | supported | 0.020 to 0.030 |" in page
    assert "| open_clip | ResNet | `c` | it is convolutional |  |" in page


def test_rows_of_other_models_stay() -> None:
    before = [Row("timm", "A", "a", (), None, 0.1), Row("open_clip", "B", "b", (), None, 0.2)]
    new = [Row("timm", "A", "a", (), None, 0.3)]
    assert coverage.joined(new, before) == [before[1], new[0]]


def test_a_failure_is_named() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    broken = Case("timm", "A", "a", lambda depth: Wide(), (8, 8))
    (row,) = coverage.run([broken], 2, lambda line: None)
    assert row.error is None and row.reason is not None and "image tower" in row.reason


def test_weights_have_gain_one() -> None:
    trunk = make_trunk("clip")
    stir(trunk)
    weight = trunk.get_parameter("blocks.0.mlp.fc1.weight")
    assert abs(float(weight.std()) * weight.shape[1] ** 0.5 - 1) < 0.05
    gamma = trunk.get_parameter("blocks.0.norm1.weight")
    assert (gamma[:4] > 2.9).all() and (gamma[4:] <= 1.5).all()
