"""Small pictures for a README."""

import io
from pathlib import Path

from PIL import Image

from lraee.study.page import pictures
from tests.study_report import report, without_parts


def test_small_and_the_same_twice(tmp_path: Path) -> None:
    built = [pictures.save(report(), tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in built[0]] == ["frontier.png", "lens.png", "drift.png"]
    for one, other in zip(*built, strict=True):
        data = one.read_bytes()
        assert data == other.read_bytes() and len(data) < 60_000
        colours = Image.open(io.BytesIO(data)).convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 20


def test_nothing_of_nothing(tmp_path: Path) -> None:
    assert pictures.save(without_parts(), tmp_path / "none") == []
