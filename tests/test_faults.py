"""Faults injected: what the user is told, and what is left on disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import lraee
from lraee.cli import common
from lraee.cli import main as cli
from lraee.diagnostics import selftest
from lraee.layers import build
from lraee.measurement import timing
from lraee.storage import stages
from tests.clip_models import make_images
from tests.small_calibration import assert_same_exits, calibrated, pictures, small_clip
from tests.support import assert_same

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


def _failing(function: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """The function, whose call number `at` raises."""
    count = 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise error
        return function(*args, **named)

    return call


# Memory


def test_no_memory_in_accelerate_leaves_the_model_alone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("no memory")
        patch.setattr(build, "quantize_weight", _failing(build.quantize_weight, 7, error))
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            lraee.accelerate(model)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)
    lraee.accelerate(model, check=make_images(4))


@torch.no_grad()
def test_no_memory_in_a_call_leaves_the_next_call_right(model: nn.Module) -> None:
    fast, images = lraee.accelerate(model), make_images(3)
    expected = fast.encode_image(images)
    block = fast.visual.transformer.resblocks[2]
    handle = block.register_forward_hook(_failing(lambda *_: None, 1, MemoryError("no memory")))
    with pytest.raises(MemoryError, match="no memory"):
        fast.encode_image(images)
    handle.remove()
    assert_same(fast.encode_image(images), expected)


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
)
def test_calibrate_goes_on_after_no_memory_or_a_full_disk(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder, images = tmp_path / "run", pictures(120)
    with monkeypatch.context() as patch:  # the mark and one stage are written before
        patch.setattr(stages, "replace_file", _failing(stages.replace_file, 3, error))
        with pytest.raises(type(error), match=re.escape(str(error))):
            calibrated(model, images, folder=folder)
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert_same_exits(calibrated(model, images, folder=folder), calibrated(model, images))
    assert not folder.exists()


# Runs cut off

_CUT_OFF = """
import os, signal
from lraee.storage import stages
from tests.small_calibration import calibrated, pictures, small_clip

write, left = stages.replace_file, [{writes}]

def cut_off(path, data):
    write(path, data)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

stages.replace_file = cut_off
calibrated(small_clip(), pictures(120), folder={folder!r})
"""


@pytest.mark.parametrize("writes", [1, 3])
def test_calibrate_goes_on_after_sigkill(tmp_path: Path, model: nn.Module, writes: int) -> None:
    folder, images = tmp_path / "run", pictures(120)
    script = _CUT_OFF.format(writes=writes, folder=str(folder))
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=300)
    assert run.returncode == -signal.SIGKILL
    kept = sorted(folder.glob("*.safetensors"))
    assert len(kept) == writes - 1
    if kept:  # a damaged stage is made again
        kept[0].write_bytes(kept[0].read_bytes()[:-1])
    assert_same_exits(calibrated(model, images, folder=folder), calibrated(model, images))
    assert not folder.exists()


# Loaders


class _Batches:
    """Pictures in batches; from pass `turn` on, what follows the first batch is reversed."""

    def __init__(self, images: Tensor, turn: int) -> None:
        self.parts, self.turn, self.passes = list(images.split(30)), turn, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        first, *rest = self.parts
        return iter([first, *(rest[::-1] if self.passes >= self.turn else rest)])


@pytest.mark.parametrize("turn", [3, 4])  # the first pass takes one batch
def test_an_order_that_changes_in_a_pass_is_refused(model: nn.Module, turn: int) -> None:
    with pytest.raises(ValueError, match="in the same order in each pass, got another one at pla"):
        calibrated(model, _Batches(pictures(120), turn))


class _Dying(_Batches):
    """A loader whose worker dies in a pass, as torch's DataLoader tells it."""

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield self.parts[0]
        if self.passes >= self.turn:
            raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
        yield from self.parts[1:]


@pytest.mark.parametrize("turn", [2, 3])
def test_a_worker_that_dies_is_named_and_the_run_goes_on(
    tmp_path: Path, model: nn.Module, turn: int
) -> None:
    folder, images = tmp_path / "run", pictures(120)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        calibrated(model, _Dying(images, turn), folder=folder)
    again = calibrated(model, _Dying(images, 99), folder=folder)
    assert_same_exits(again, calibrated(model, _Batches(images, 99)))
    assert not folder.exists()


# Installations


def test_without_the_extension_the_reference_runs_and_cpu_says_why() -> None:
    script = (
        "import sys; sys.modules['lraee._C'] = None\n"
        "import torch, lraee\n"
        "from tests.small_calibration import small_clip\n"
        "from tests.clip_models import make_images\n"
        "model = small_clip()\n"
        "assert torch.no_grad()(lraee.accelerate(model).encode_image)(make_images(1)).isfinite()"
        ".all()\n"
        "lraee.accelerate(model, backend='cpu')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "C++ extension not available" in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: accelerate: backend must run here, got 'cpu': the C++")


def test_an_extension_of_another_torch_is_reported_as_absent(tmp_path: Path) -> None:
    script = (
        "import sys, importlib.abc\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'lraee._C':\n"
        "            raise ImportError('_C.so: undefined symbol: _ZN3c10')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from lraee.ops import registry; print(registry.CPU_EXTENSION_ERROR)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.stdout.strip() == "_C.so: undefined symbol: _ZN3c10"
    assert "the slow plain-torch reference" in run.stderr


def test_nan_in_one_block_is_refused_by_name(model: nn.Module) -> None:
    broken = small_clip()
    broken.visual.transformer.resblocks[4].mlp.c_proj.weight.data[1, 2] = torch.nan
    with pytest.raises(NotImplementedError, match=r"resblocks\.4 has NaN or Inf in mlp\.c_proj"):
        lraee.accelerate(broken)


def test_no_duration_is_read_from_a_clock_that_can_go_back() -> None:
    for path in (ROOT / "lraee").rglob("*.py"):
        assert not re.search(r"\btime\.time\(", path.read_text()), path


# Outputs


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "--data", ROOT, "--out"),
        ("evaluate", "--data", ROOT, "--out"),
        ("demo", "--data", ROOT, "--out"),
        ("bench", "--out"),
        ("selftest", "--json-out"),
        ("report", "--data", ROOT, "--report-data", ROOT, "--classes", ROOT / "LICENSE", "--out"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_work(
    tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "inside"
    result = CliRunner().invoke(cli.app, [*map(str, arguments), str(out)])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"lraee: error: output must be writable, got {out}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(common, "TemporaryFile", _failing(common.TemporaryFile, 1, error))
    with pytest.raises(OSError, match="must be writable, got .*: Read-only file system; name"):
        common.require_writable(tmp_path / "report.json")
    with pytest.raises(OSError, match="Is a directory"):
        common.require_writable(tmp_path)
    common.require_writable(tmp_path / "new" / "report.json")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_cannot_be_printed_is_escaped(encoding: str) -> None:
    script = (
        "from lraee.cli import main, common\n"
        "@common.command\n"
        "def show() -> None:\n"
        "    common.line('photo', 'caf\\u00e9\\u200b \\udcff.jpg')\n"
        "    common.console.print('\\u00e9')\n"
        "main.main()\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    run = subprocess.run(
        [sys.executable, "-c", script, "show"], cwd=ROOT, check=True, capture_output=True,
        timeout=300, env=environment,
    )  # fmt: skip
    first, second = run.stdout.decode(encoding).splitlines()
    name = "caf\\xe9" if encoding == "ascii" else "café"
    assert first.split(maxsplit=1) == ["photo", f"{name}\\u200b \\udcff.jpg"]
    assert second == ("\\xe9" if encoding == "ascii" else "é")


@pytest.mark.parametrize("arguments", [("bench", "--out"), ("selftest", "--json-out")])
def test_a_result_is_written_before_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    result: dict[str, object] = {"schema": "lraee.selftest/1", "gpu": "none", "is_ok": True}
    monkeypatch.setattr(selftest, "examine", lambda *_, **__: result)
    monkeypatch.setattr(timing, "time_tower", lambda *_, **__: [])
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as /dev/full
    monkeypatch.setattr(common.console, "print", _failing(common.console.print, 1, error))
    out = tmp_path / "result.json"
    run = CliRunner().invoke(cli.app, [*arguments, str(out)])
    assert run.exit_code == 1
    assert run.stderr.strip().endswith("No space left on device")
    assert json.loads(out.read_text())["schema"].startswith("lraee.")
