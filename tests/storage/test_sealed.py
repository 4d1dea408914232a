"""Saves are whole or absent: links, read-only folders, full disks, kills, other processes."""

import errno
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import torch

from lraee.storage import folder as locks
from tests.exits.small_exits import small_exits
from tests.sealed_files import Store, cuts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(save: Callable[[Path], None], folder: Path) -> dict[str, bytes]:
    """The files of this save in a folder of its own."""
    save(folder)
    return contents(folder)


def in_child(work: Callable[[], object]) -> int:
    """Forks, works without threads and leaves; returns the process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return process


# Links and read-only folders


def test_reading_follows_links_and_writing_replaces_them(store: Store, tmp_path: Path) -> None:
    """A snapshot of links into blobs/, as huggingface_hub lays it out, behind a linked folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "link"
    for folder in (blobs, tmp_path / "snapshot"):
        folder.mkdir()
    snapshot.symlink_to("snapshot")
    store.put(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name[::-1])
        path.symlink_to(f"../blobs/{path.name[::-1]}")
    before = contents(blobs)
    store.load(snapshot)
    store.save(snapshot)  # the same tensors under the same name
    store.save_other(snapshot)
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert contents(blobs) == before and snapshot.is_symlink()
    assert contents(snapshot) == saved(store.save_other, tmp_path / "alone")


def test_a_folder_without_rights_to_write_is_read_and_not_saved_to(
    store: Store, tmp_path: Path
) -> None:
    before = saved(store.save, tmp_path)
    code = os.waitpid(in_child(partial(_use_read_only, store, tmp_path)), 0)[1]
    tmp_path.chmod(0o755)
    assert code == 0 and contents(tmp_path) == before


def _use_read_only(store: Store, folder: Path) -> None:
    os.chdir(folder)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 65534)  # root may write anywhere
    store.load(Path("."))
    with pytest.raises(OSError) as caught:
        store.save_other(Path("."))
    assert re.match(r"save: .* must be writable, got Permission denied; ", str(caught.value))


def test_a_folder_that_cannot_be_locked(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is removed there: another process might just have made it the current one."""
    store.save(tmp_path)
    monkeypatch.setattr(locks, "fcntl", None)
    store.load(tmp_path)
    store.save_other(tmp_path)
    store.load(tmp_path)
    assert len(contents(tmp_path)) == 3 and "cannot be locked" in caplog.text


# Saves that end early


def test_cut_off_anywhere(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (saved(save, tmp_path / "x") for save in (store.save, store.save_other))
    folder, name, outcomes = tmp_path / "folder", store.form.config_name, []
    store.save(folder)
    (folder / "README.md").write_text("mine")
    for _ in cuts(monkeypatch, partial(store.save_other, folder)):
        outcomes.append((folder / name).read_bytes() == old[name])
        store.load(folder)
        store.save(folder)
        assert contents(folder) == {**old, "README.md": b"mine"}
    assert outcomes[:4] == [True] * 4 and False in outcomes, outcomes
    assert contents(folder) == {**new, "README.md": b"mine"}


FILES = tuple(f"storage/{name}.py" for name in ("files", "folder", "sealed"))


def killing(line: int, work: Callable[[], object]) -> int:
    """Ends the process by SIGKILL at this line of those that run in storage; or counts them."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        count += event == "line"
        if count == line and event == "line":
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def test_killed_at_twenty_points(tmp_path: Path) -> None:
    """Old or new exits whole, and what the dead process left goes with the next save."""
    old, new = small_exits(), small_exits("confidence", seed=1)
    expected = [saved(exits.save, tmp_path / str(i)) for i, exits in enumerate((old, new))]
    folder, outcomes = tmp_path / "folder", []
    old.save(folder)
    lines = killing(0, partial(new.save, tmp_path / "counted"))
    for point in range(1, 21):
        work = partial(killing, lines - (20 - point) * 4, partial(new.save, folder))
        code = os.waitpid(in_child(work), 0)[1]
        left = contents(folder)
        assert code == signal.SIGKILL
        outcomes.append(left["exits.json"] == expected[1]["exits.json"])
        assert expected[outcomes[-1]].items() <= left.items(), (point, sorted(left))
        old.save(folder)
        assert contents(folder) == expected[0]
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}, outcomes


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_disk_that_is_full(tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE stands for it: a write that is cut short and then fails."""
    small_exits().save(tmp_path)
    before = contents(tmp_path)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError) as caught:
            small_exits(seed=1, classes=500).save(tmp_path)
        assert " must be writable, got File too large; free space" in str(caught.value)
        assert caught.value.errno == errno.EFBIG

    assert os.waitpid(in_child(work), 0)[1] == 0
    assert contents(tmp_path) == before


# Other processes


def test_processes_that_save_into_one_folder(tmp_path: Path) -> None:
    """Readers find whole exits all the time, and one save is there in the end."""
    choices = [small_exits(seed=seed) for seed in range(3)]
    expected = [saved(e.save, tmp_path / str(i)) for i, e in enumerate(choices)]
    folder = tmp_path / "folder"
    choices[0].save(folder)

    def save(seed: int) -> None:
        for turn in range(30):
            choices[(seed + turn) % 3].save(folder)

    processes = [in_child(partial(save, seed)) for seed in range(3)]
    processes.append(in_child(lambda: [type(choices[0]).load(folder) for _ in range(60)]))
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 4
    choices[1].save(folder)
    assert contents(folder) == expected[1]


def test_the_document_reads_the_files(store: Store, tmp_path: Path) -> None:
    """docs/checkpoint-format.md shows how, without this package."""
    store.put(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "lraee" not in re.sub(r'"[^"]*"', "", code)
    names: dict[str, Any] = {"folder": tmp_path, "config_name": store.form.config_name}
    exec(code, names)
    with safetensors.safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert set(names["tensors"]) == set(file.keys())
        for name, tensor in names["tensors"].items():
            assert torch.equal(tensor, file.get_tensor(name))
