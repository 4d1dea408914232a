"""`lraee embed` and `lraee merge`: exit codes, one-line errors, files that tools can read."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lraee.cli import main as cli
from tests.cli.test_main import one_line, run
from tests.image_files import encoded, folder
from tests.serving.fake_encoder import contents, failures, folders, rows


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos, one that is none, a sidecar and a hidden folder."""
    root = folder(tmp_path / "photos")
    (root / "n01" / "bad.png").write_bytes(b"nothing")
    (root / "n01" / "0.xmp").touch()
    (root / ".thumbnails").mkdir()
    return root


def embedded(*arguments: object) -> str:
    result = run("embed", *arguments, "--no-progress")
    assert result.exit_code == 0, result.output
    return result.stdout


def vectors(out: Path) -> dict[str, bytes]:
    """Name without its folders -> bits of its embedding."""
    table = rows(out)
    bits = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    names = [Path(path).name for path in table["path"].to_pylist()]
    folders = [Path(path).parent.name for path in table["path"].to_pylist()]
    return {f"{a}/{b}": row.tobytes() for a, b, row in zip(folders, names, bits, strict=True)}


def test_a_folder_of_photos(photos: Path, tmp_path: Path) -> None:
    line = embedded(photos, "--out", tmp_path / "out")
    assert line.endswith(
        "6 embedded, 0 resumed, 3 skipped (1 has no photo's suffix, 1 is a hidden folder, "
        "1 is not a whole image)\n"
    )
    table = rows(tmp_path / "out")
    assert table.column_names == [
        "path", "embedding", "width", "height", "size", "mtime", "exit_block",
    ]  # fmt: skip
    assert table["path"].to_pylist()[:2] == ["n01/0.jpg", "n01/1.jpg"]
    assert set(table["width"].to_pylist()) == {80} and table["exit_block"].null_count == 6
    assert set(failures(tmp_path / "out")) == {".thumbnails", "n01/0.xmp", "n01/bad.png"}
    again = run("embed", photos, "--out", tmp_path / "out", "--json", "--no-progress")
    assert json.loads(again.stdout)["resumed"] == 6 and again.exit_code == 0


def test_every_source_gives_the_same_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.relative_to(photos))
    for k in range(2):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as tar:
            for path in paths[3 * k : 3 * k + 3]:
                tar.add(path, path.relative_to(photos))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    embedded(photos, "--out", tmp_path / "out")
    expected = vectors(tmp_path / "out")
    for name in ("p.zip", "*.tar", "list.txt"):
        embedded(tmp_path / name, "--out", tmp_path / f"{name}.parquet")
        assert vectors(tmp_path / f"{name}.parquet") == expected, name
        begin_in = {"p.zip": tmp_path / "p.zip", "*.tar": tmp_path, "list.txt": None}[name]
        assert folders(tmp_path / f"{name}.parquet") == {begin_in and str(begin_in)}
    stdin = io.TextIOWrapper(io.BytesIO(b"\0".join(map(os.fsencode, paths))))
    monkeypatch.setattr(sys, "stdin", stdin)
    from lraee.serving import listing

    monkeypatch.setattr(listing.sys, "stdin", stdin)
    from lraee.data.sources import Limits

    assert len(list(listing.open_listing(["-"], Limits()))) == 6


def test_shards_and_merge(photos: Path, tmp_path: Path) -> None:
    embedded(photos, "--out", tmp_path / "whole")
    for i in (1, 2):
        embedded(photos, "--out", tmp_path / str(i), "--shard", f"{i}/2")
    result = run("merge", tmp_path / "2", tmp_path / "1", "--out", tmp_path / "all.parquet")
    assert result.exit_code == 0 and "6 embedded, 3 skipped, 2 shards" in result.stdout
    assert vectors(tmp_path / "all.parquet") == vectors(tmp_path / "whole")
    moved = photos.rename(tmp_path / "mount")
    embedded(moved, "--out", tmp_path / "2", "--shard", "2/2")
    result = run("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "b.parquet")
    assert result.exit_code == 0 and result.stderr == (
        f"merge: the shards' photos lie in {photos}, {moved}; `lraee serve` needs --photos-from\n"
    )
    result = run("merge", tmp_path / "2", "--out", tmp_path / "x")
    assert "merge: shards must be 1/2 to 2/2, got 2/2" in one_line(result)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a cat\n\na dog\n")
    embedded("--texts", tmp_path / "t.txt", "--out", tmp_path / "out", "--dtype", "float16")
    table = rows(tmp_path / "out")
    assert table.column_names == ["text", "embedding"]
    assert table["text"].to_pylist() == ["a cat", "a dog"]
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 256)
    assert failures(tmp_path / "out") == {"line 2": "is empty"}
    embedded("--texts", tmp_path / "t.txt", "--out", tmp_path / "int8", "--text", "int8")
    int8 = rows(tmp_path / "int8")["embedding"].to_pylist()
    float_rows = table["embedding"].to_pylist()
    for one, other in zip(int8, float_rows, strict=True):
        assert sum(x * y for x, y in zip(one, other, strict=True)) == pytest.approx(1, abs=0.01)


def test_modes_and_limits(photos: Path, tmp_path: Path) -> None:
    (photos / "n01" / "large.jpg").write_bytes(encoded(9, size=(1200, 900)))
    embedded(photos, "--out", tmp_path / "fast")
    embedded(photos, "--out", tmp_path / "exact", "--exact")
    fast, exact = vectors(tmp_path / "fast"), vectors(tmp_path / "exact")
    assert {name for name in fast if fast[name] != exact[name]} == {"n01/large.jpg"}
    embedded(photos, "--out", tmp_path / "few", "--limit-pixels", 80 * 64)
    assert "has 1200 x 900 pixels" in failures(tmp_path / "few")["n01/large.jpg"]
    result = run("embed", photos, "--out", tmp_path / "fast", "--exact")
    assert "must be made with preprocess.mode 'exact', got 'fast'" in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "--out", "x"),
        ("embed", ".", "--texts", __file__, "--out", "x"),
        ("embed", "."),
        ("embed", ".", "--out", "x", "--shard", "3/2"),
        ("embed", ".", "--out", "x", "--dtype", "int8"),
        ("embed", ".", "--out", "x", "--scheme", "int4"),
        ("embed", ".", "--out", "x", "--batch", "0"),
        ("embed", ".", "--out", "x", "--text", "int8"),
        ("embed", "--texts", __file__, "--out", "x", "--text", "int4"),
        ("embed", "--texts", __file__, "--out", "x", "--scheme", "int8"),
        ("embed", "--texts", __file__, "--out", "x", "--exits", "."),
        ("merge", "--out", "x"),
        ("merge", "/nowhere", "--out", "x"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_what_cannot_be_done_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(
        "lraee.serving.embed_model.open_model", lambda *a, **k: opened.append(a) or 1 / 0
    )
    (tmp_path / "file").touch()
    result = run("embed", photos, "--out", tmp_path / "file" / "out")
    assert "must be writable: [Errno 20]" in one_line(result)
    (tmp_path / "folder.parquet").mkdir()
    result = run("embed", photos, "--out", tmp_path / "folder.parquet")
    assert "must be a file or a new name, got the folder" in one_line(result)
    result = run("embed", tmp_path / "missing", "--out", tmp_path / "out")
    assert "got no such thing" in one_line(result)
    assert not opened and not (tmp_path / "out").exists()


def test_a_missing_pyarrow_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = one_line(run("embed", photos, "--out", tmp_path / "out"))
    assert "pip install 'lraee[embed]'" in message


@pytest.mark.parametrize("command", ["embed", "merge"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"lraee {command}" in result.stdout
    assert "Example:" in result.stdout
    assert cli.app.registered_commands


# Imports what a run needs, starts no thread, and forks for each line of arguments: SIGKILL then
# ends a process of the command alone, and twenty of them need not import torch twenty times.
LAUNCHER = """
import json, os, sys
import lraee.cli.main, lraee.serving.embed, lraee.serving.embed_model, pyarrow.parquet
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["lraee", *json.loads(line)]
        lraee.cli.main.main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_killed_commands_go_on_to_the_same_files(
    tmp_path: Path, name: str, launcher: subprocess.Popen[str]
) -> None:
    """The command itself, killed at random points, ten times a kind of output."""
    assert launcher.stdin is not None and launcher.stdout is not None
    root = folder(tmp_path / "photos", count=100)
    options = (str(root), "--no-progress", "--part-rows", "8", "--batch", "8", "--out")
    whole = tmp_path / "whole" / name
    embedded(*options, whole)
    rng, deaths = random.Random(0), 0
    for k in range(10):
        out = tmp_path / str(k) / name
        launcher.stdin.write(json.dumps(["embed", *options, str(out)]) + "\n")
        launcher.stdin.flush()
        child = int(launcher.stdout.readline())
        folder_of_parts = out.with_name(f"{name}.parts") if out.suffix else out
        want = rng.randint(0, 24)
        for _ in range(300_000):
            if folder_of_parts.exists() and len(list(folder_of_parts.glob("part-*"))) >= want:
                break
            if out.suffix and out.exists():
                break  # it came to its end in between
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02 if want < 24 else 0)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        deaths += int(launcher.stdout.readline()) == signal.SIGKILL
        embedded(*options, out)
        assert contents(out) == contents(whole), k
    assert deaths >= 8


def test_files_open_without_lraee(photos: Path, tmp_path: Path) -> None:
    embedded(photos, "--out", tmp_path / "all.parquet")
    script = (
        "import sys, pyarrow.parquet as pq; t = pq.read_table(sys.argv[1]);"
        "print(len(t), t.to_pylist()[0]['mtime'].year, 'lraee' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "all.parquet")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert output[0] == "6" and output[2] == "False"
    assert pq.read_schema(tmp_path / "all.parquet").metadata.keys() == {
        b"lraee", b"lraee.photos_from",
    }  # fmt: skip
