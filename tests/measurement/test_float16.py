"""Where float16 is faster: what was measured here, and the user's table before it."""

import json
from pathlib import Path

import pytest

from lraee.kernels import user_cache
from lraee.measurement import float16
from lraee.measurement.float16 import TowerTime

B16 = "L=197 D=768 blocks=12"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))


def test_towers_that_float16_won_on_the_first_gpu() -> None:
    line = float16.faster_line("NVIDIA H200", B16)
    assert line is not None and "1.06x to 1.57x faster" in line and "batch 1, 8, 32, 128" in line
    assert "measured 2026-11-27 with earlier kernels; `lraee tune`" in line
    assert float16.faster_line("NVIDIA H200", "L=50 D=768 blocks=12") is None
    assert float16.faster_line("another GPU", B16) is None
    assert float16.faster_line("NVIDIA H200", "L=1 D=1 blocks=1") is None


def test_the_figures_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("|")]
    for name, key in (("ViT-B/32", "L=50 D=768 blocks=12"), ("ViT-B/16", B16),
                      ("ViT-L/14", "L=257 D=1024 blocks=24")):  # fmt: skip
        at = next(i for i, row in enumerate(rows) if name in row and "lraee int8" in row)
        times = float16.MEASURED["NVIDIA H200"][key]
        for index, attribute in ((at, "int8_ms"), (at + 1, "float16_ms")):
            shown = [float(cell.split()[0]) for cell in rows[index].split("|")[2:6]]
            assert shown == [getattr(row, attribute) for row in times.rows]


def test_the_users_table_stands_before_it() -> None:
    float16.store(
        "NVIDIA H200", B16, [TowerTime(1, 0.5, 0.7), TowerTime(8, 1.2, 1.1)], "2027-01-02"
    )
    line = float16.faster_line("NVIDIA H200", B16)
    assert line is not None and "1.09x faster" in line and line.endswith("(measured 2027-01-02)")
    float16.store("NVIDIA H200", "x", [TowerTime(1, 2.0, 1.0)], "2027-01-02")
    assert set(float16.tower_keys("NVIDIA H200")) >= {B16, "x"}
    float16.store("another GPU", B16, [TowerTime(1, 0.5, 0.7)], "2027-01-02")
    assert float16.faster_line("another GPU", B16) is None
    assert float16.tower_keys("another GPU") == [B16]


@pytest.mark.parametrize(
    "towers",
    ["x", [1], {B16: 3}, {B16: {"rows": "x"}}, {B16: {"rows": [3, {}, {"batch": 1}]}},
     {B16: {"rows": [{"batch": 1, "int8_ms": -1.0, "float16_ms": 1.0}]}},
     {B16: {"rows": [{"batch": "1", "int8_ms": 1.0, "float16_ms": 1.0}]}},
     {B16: {"rows": [{"batch": 1, "int8_ms": 1e9, "float16_ms": 1.0}], "date": 3}}],
)  # fmt: skip
def test_a_damaged_table_is_none(towers: object) -> None:
    path = user_cache.write(float16.NAME, {})
    path.write_text(json.dumps({"gpu": "a GPU", "towers": towers}))
    assert float16.faster_line("a GPU", B16) is None
