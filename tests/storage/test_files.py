"""One file: read within limits through links, replaced whole and never through them."""

import errno
import os
import stat
from pathlib import Path

import pytest

from lraee.storage.files import CheckpointError, Violation, read_file, refusing, replace_file


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "name"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert os.listdir(tmp_path) == ["name"] and path.read_bytes() == b"old"


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(Violation, match="must be of at most 10 bytes, got 11"):
        read_file(tmp_path / "large", 10)
    with pytest.raises(Violation, match="must stay of 0 bytes while it is read"):
        read_file(Path("/proc/self/status"), 10)  # says it is empty


def test_errors_become_one_line_about_the_file() -> None:
    path = Path("x")
    for error, line in (
        (Violation("a must be 1", 2), "load: x: a must be 1, got 2; copy"),
        (Violation("a must be 1", 2, "upgrade"), "load: x: a must be 1, got 2; upgrade"),
        (ValueError("two\nlines"), "load: x: two lines; copy"),
        (OSError(5, "EIO"), "load: x: must be a readable file, got EIO; copy"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError) as caught, refusing(path, "copy"):
            raise error
        assert str(caught.value) == line


@pytest.mark.parametrize(("number", "is_taken"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_mount_whose_folders_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_taken: bool
) -> None:
    flush = os.fsync

    def of_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    if is_taken:
        replace_file(tmp_path / "file", b"new")
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
