"""What doctor says of tables on a GPU that is made up."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from lraee.diagnostics import tables
from lraee.kernels import user_cache


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))


def store(**changes: object) -> None:
    table = {
        "gpu": "NVIDIA H200", "triton": metadata.version("triton"), "rows": [{}, {}],
        "date": "2027-01-02",
    }  # fmt: skip
    user_cache.write("tilings", table | changes)


def test_which_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.tiling_lines() == ["cuda:0 measured on one H100 (kernels/measured.py)"]
    store()
    assert tables.tiling_lines() == ["cuda:0 of `lraee tune`, 2 rows, 2027-01-02"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA A100")
    (line,) = tables.tiling_lines()
    assert line.startswith("cuda:0 chosen by a cost model; `lraee tune` measures them here")
    assert line.endswith("is of another GPU (NVIDIA H200)")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"triton": "3.0.0"}, "of another Triton (3.0.0)"), ({"rows": "x"}, "damaged")],
)
def test_why_a_table_is_not_read(changes: dict[str, object], reason: str) -> None:
    store(**changes)
    assert tables.tiling_lines()[0].endswith(f"the table of `lraee tune` is {reason}")


def test_towers_that_float16_won() -> None:
    lines = tables.float_lines()
    assert [line.partition(":")[0] for line in lines] == ["ViT-B/16", "ViT-L/14"]
    assert all("float16 is" in line for line in lines)


def test_no_gpu_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tables.tiling_lines() == tables.float_lines() == []
