"""What doctor says of tables on a mocked GPU."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from lraee.diagnostics import tables
from lraee.kernels import first_use, tuned, user_cache


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    tuned.table.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))


ROW = {
    "N": 768, "K": 768, "most_m": 1 << 31, "epilogue": "none", "family": "simple",
    "config": [64, 64, 128, 4, 3, 1], "us": 3.5,
}  # fmt: skip


def store(**changes: object) -> None:
    table = {
        "gpu": "NVIDIA H200", "triton": metadata.version("triton"), "rows": [ROW, ROW],
        "date": "2027-01-02",
    }  # fmt: skip
    user_cache.write("tilings", table | changes)
    tuned.table.cache_clear()


def test_which_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = tables.tiling_lines()
    assert line.startswith("cuda:0 measured on one H100 (kernels/measured.py); ")
    assert line.endswith("lraee tune writes one")
    store()
    assert tables.tiling_lines() == ["cuda:0 the table of `lraee tune` of 2027-01-02, 2 rows"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA A100")
    (line,) = tables.tiling_lines()
    assert line.startswith("cuda:0 chosen by a cost model; the table of tilings is for gpu")


def test_families_that_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    first_use._read_once.cache_clear()
    (line,) = tables.family_lines()
    assert line.startswith("cuda:0 persistent products: not checked on this GPU yet")
    first_use._store("persistent", "NVIDIA H200", first_use.Verdict(False, "no end in 120 s", 3))
    first_use._read_once.cache_clear()
    assert tables.family_lines() == ["cuda:0 persistent products: no end in 120 s"]
    first_use._store("persistent", "NVIDIA H200", first_use.Verdict(True, ""))
    first_use._read_once.cache_clear()
    assert tables.family_lines() == []
    first_use._read_once.cache_clear()


@pytest.mark.parametrize("changes", [{"triton": "3.0.0"}, {"rows": "x"}, {"rows": [1]}])
def test_why_a_table_is_not_read(changes: dict[str, object]) -> None:
    store(**changes)
    (line,) = tables.tiling_lines()
    assert line.startswith("cuda:0 measured on one H100") and "; " in line


def test_towers_that_float16_won() -> None:
    lines = tables.float_lines()
    assert [line.partition(":")[0] for line in lines] == ["ViT-B/16", "ViT-L/14"]
    assert all("float16 is" in line for line in lines)


def test_no_gpu_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tables.tiling_lines() == tables.float_lines() == []
