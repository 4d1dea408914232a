"""Faults of disks, builds, processes and caches: what is said, and what is left on disk."""

import errno
import importlib.machinery
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

import lraee
from lraee.cli import main as cli
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Shape, legal, measured, pick
from lraee.kernels.measured import MEASURED
from lraee.serving.search.thumbnails import is_whole
from lraee.study.page.saving import write_report
from tests.clip_models import make_images
from tests.exits.random_exits import make_exits
from tests.image_files import encoded
from tests.serving import fake_encoder
from tests.small_calibration import assert_same_exits, calibrated, pictures, small_clip
from tests.study_report import report
from tests.support import assert_same

ROOT = Path(__file__).parents[1]


# Disks


@contextmanager
def _full_disk(limit: int) -> Iterator[None]:
    """Files of this process end at `limit` bytes, as on a disk without more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_embed_goes_on_after_a_full_disk(tmp_path: Path, name: str) -> None:
    root = fake_encoder.library(tmp_path / "photos")
    with _full_disk(1500), pytest.raises(OSError) as caught:
        fake_encoder.embed(root, tmp_path / name)
    assert caught.value.errno == errno.EFBIG
    left = [path for path in tmp_path.rglob("*.parquet") if path.is_file()]
    assert not left, left
    fake_encoder.embed(root, tmp_path / name)
    fake_encoder.embed(root, tmp_path / "whole" / name)
    assert fake_encoder.contents(tmp_path / name) == fake_encoder.contents(
        tmp_path / "whole" / name
    )


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_report_keeps_its_old_files_on_a_full_disk(tmp_path: Path, limit: int) -> None:
    old = {path.name: path.read_bytes() for path in write_report(report(), tmp_path)}
    with _full_disk(limit), pytest.raises(OSError, match="File too large"):
        write_report(report(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_command_says_of_a_full_disk_in_one_line(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(encoded(0, "PNG"))
    with _full_disk(100):
        result = CliRunner().invoke(
            cli.app, ["embed", str(tmp_path), "--out", str(tmp_path / "out"), "--no-progress"]
        )
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("lraee: error: ") and "File too large" in line
    assert not list((tmp_path / "out").glob("*.parquet"))


# Loaders


class _Dies(Dataset[Tensor]):
    """Pictures; the process that loads picture 90 ends there where `path` does not exist."""

    def __init__(self, images: Tensor, path: Path) -> None:
        self.images, self.path = images, path

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        if place == 90 and not self.path.exists():
            os._exit(1)
        return self.images[place]


def test_a_loaders_process_dies_and_the_run_goes_on(tmp_path: Path) -> None:
    model, images, repaired = small_clip(), pictures(120), tmp_path / "repaired"
    loader = DataLoader(_Dies(images, repaired), batch_size=30, num_workers=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*exited unexpectedly"):
        calibrated(model, loader, folder=tmp_path / "run")
    repaired.touch()
    again = calibrated(model, loader, folder=tmp_path / "run")
    assert_same_exits(again, calibrated(model, list(images.split(30))))
    assert not (tmp_path / "run").exists()


# Builds


def _import_of(path: Path) -> subprocess.CompletedProcess[str]:
    """lraee with this file as its extension."""
    script = (
        "import sys, importlib.abc, importlib.util\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'lraee._C':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(path)!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from lraee.ops import registry; print(registry.CPU_EXTENSION_ERROR)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip


def test_half_an_extension_is_reported_as_absent(tmp_path: Path) -> None:
    half = tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    half.write_bytes(b"\x7fELF" + bytes(1000))
    run = _import_of(half)
    assert str(half) in run.stdout and "the slow plain-torch reference" in run.stderr


_FAKE_PYTHON = """#!/bin/sh
# as setuptools: what lies in build/ is newer than its sources, so it is taken as it is
[ -e build/lib.linux/lraee/_C.so ] || {
  mkdir -p build/lib.linux/lraee && echo whole > build/lib.linux/lraee/_C.so
}
cp build/lib.linux/lraee/_C.so lraee/_C.so
"""


def test_make_links_anew_after_it_was_interrupted(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("csrc", "lraee", "build/lib.linux/lraee", ".venv/bin", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("pyproject.toml", "setup.py", "scripts/find_python.sh", "requirements/ci.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for step, place in (("python", 1), ("torch", 2), ("package", 3)):
        (tmp_path / ".venv" / f".{step}").touch()
        os.utime(tmp_path / ".venv" / f".{step}", ns=(2**62 + place, 2**62 + place))
    for half in ("build/lib.linux/lraee/_C.so", "lraee/_C.so"):
        (tmp_path / half).write_text("half")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(_FAKE_PYTHON)
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("VENV", "LRAEE_BUILD_EXT")}
    subprocess.run(
        ["make", "--silent", ".venv/.extension"], cwd=tmp_path, check=True, env=environment
    )
    assert (tmp_path / "lraee" / "_C.so").read_text() == "whole\n"
    assert (tmp_path / ".venv" / ".extension").exists()


# Tables and caches


def test_a_damaged_row_of_the_tuning_table_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    arch, shape = ARCHS[90], Shape(50, 768, 768)
    assert pick(shape, arch) == measured(shape, arch)
    damaged = {(768, 768): ((10**9, (48, 7, 5, 3, 0, 1)),)}
    monkeypatch.setitem(MEASURED, 90, damaged)
    assert measured(shape, arch) is None
    assert legal(pick(shape, arch), shape, arch)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8 cut", bytes(100)])
def test_a_damaged_thumbnail_is_not_whole(data: bytes) -> None:
    assert not is_whole(data)
    assert is_whole(encoded(0))


# Threads


@torch.no_grad()
def test_the_number_of_threads_may_change_between_calls() -> None:
    model, images, before = small_clip(), make_images(9), torch.get_num_threads()
    fast = lraee.accelerate(model, exits=make_exits(model, kind="static", blocks=(1, 3)))
    expected = fast.encode_image(images)
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            with lraee.trace(fast) as t:
                assert_same(fast.encode_image(images), expected, threads=threads)
            assert t.stats.images == 9
    finally:
        torch.set_num_threads(before)
