import os
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lraee.data.sources import DataError, Limits
from lraee.serving.embed import Shard
from lraee.serving.listing import open_listing
from lraee.serving.parts import read_metadata
from tests.serving.fake_encoder import (
    DIMENSIONS,
    FakeEncoder,
    contents,
    embed,
    failures,
    folders,
    killed_at,
    library,
    rows,
)


def test_rows_say_what_was_embedded(tmp_path: Path) -> None:
    root, out = library(tmp_path / "photos"), tmp_path / "out"
    totals = embed(root, out)
    table = rows(out)
    assert totals.embedded == len(table) == 52 and totals.resumed == 0
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIMENSIONS)
    assert table.schema.field("mtime").type == pa.timestamp("us", tz="UTC")
    for row in table.to_pylist():
        path = root / row["path"]
        data = path.read_bytes()
        expected = FakeEncoder().prepare(data)
        assert np.array_equal(np.float32(row["embedding"]), expected.data)
        assert (row["width"], row["height"], row["size"]) == (len(data), 7, len(data))
        assert row["exit_block"] == (len(data) % 12 if len(data) % 2 else None)
    times = table["mtime"].cast("int64").to_pylist()
    assert times == [os.stat(root / name).st_mtime_ns // 1000 for name in table["path"].to_pylist()]


def test_every_skip_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    root, out = library(tmp_path / "photos"), tmp_path / "out"
    totals = embed(root, out)
    reasons = failures(out)
    assert reasons[".thumbnails"] == "is a hidden folder"
    assert reasons["album 1/notes.txt"] == "has no photo's suffix"
    assert reasons["album 2/5.jpg"].startswith("is not a whole image")
    assert reasons["album 0/9.jpg"] == "has an embedding that is not finite"
    assert totals.skipped.total() == len(reasons) == 60 + 2 - 52
    assert totals.as_json()["skipped_reasons"] == dict(totals.skipped)
    assert totals.line().startswith("52 embedded, 0 resumed, 10 skipped (")


def test_metadata_holds_the_settings(tmp_path: Path) -> None:
    embed(library(tmp_path / "photos"), tmp_path / "out", FakeEncoder(weights="ab"))
    about, count = read_metadata(tmp_path / "out" / "part-00000.parquet")
    assert about["model"] == "fake" and about["weights"] == "ab" and about["part"] == 0
    assert count + len(about["failures"]) == 10
    last, _ = read_metadata(tmp_path / "out" / "failures.parquet")
    assert (last["parts"], last["rows"], last["failed"]) == (6, 52, 10)


def test_float16(tmp_path: Path) -> None:
    root = library(tmp_path / "photos")
    embed(root, tmp_path / "a")
    embed(root, tmp_path / "b", FakeEncoder("float16"))
    wide, half = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert half.schema.field("embedding").type == pa.list_(pa.float16(), DIMENSIONS)
    expected = np.array(wide["embedding"].to_pylist(), np.float32).astype(np.float16)
    assert np.array_equal(np.array(half["embedding"].to_pylist(), np.float16), expected)


@pytest.mark.parametrize("options", [{"batch": 1, "workers": 1}, {"batch": 64, "workers": 7}])
def test_batch_and_workers_change_nothing(tmp_path: Path, options: dict[str, int]) -> None:
    root = library(tmp_path / "photos")
    embed(root, tmp_path / "a")
    embed(root, tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_one_file(tmp_path: Path) -> None:
    root, file = library(tmp_path / "photos"), tmp_path / "new" / "all.parquet"
    embed(root, tmp_path / "parts")
    embed(root, file)
    assert rows(file).equals(rows(tmp_path / "parts"))
    assert failures(file) == failures(tmp_path / "parts")
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "all.failures.parquet", "all.parquet",
    ]  # fmt: skip
    about, _ = read_metadata(file)
    assert about["rows"] == 52 and about["shard"] is None


def test_nothing_to_embed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="PHOTOS must hold one at least, got none"):
        embed(tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out" / "failures.parquet").exists()


def test_a_file_that_vanishes_is_a_failure(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"%s\nmissing.jpg\n" % bytes(library(tmp_path / "p", 2) / "album 0/0.jpg"))
    totals = embed(open_listing([str(listed)], Limits()), tmp_path / "out")
    assert totals.embedded == 1
    assert failures(tmp_path / "out") == {
        "missing.jpg": "cannot be read: No such file or directory"
    }


def test_an_error_in_the_pool_ends_the_run(tmp_path: Path) -> None:
    class Broken(FakeEncoder):
        def prepare(self, data: bytes) -> object:  # type: ignore[override]
            raise RuntimeError("a bug")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="a bug"):
        embed(library(tmp_path / "photos"), tmp_path / "out", Broken())
    assert threading.active_count() == before
    assert not list((tmp_path / "out").glob("*.parquet"))


# Names


def test_names_are_stored_without_loss(tmp_path: Path) -> None:
    names = [b"a\xe9.jpg", "b\u202f.jpg".encode(), "e\u0301.jpg".encode(), "\u00e9.jpg".encode()]
    (tmp_path / "p").mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path / "p"), name), "wb") as file:
            file.write(name)
    embed(tmp_path / "p", tmp_path / "out")
    stored = rows(tmp_path / "out")["path"].to_pylist()
    assert stored == ["a\0e9.jpg", "b\u202f.jpg", "e\u0301.jpg", "\u00e9.jpg"]


def test_files_say_where_the_photos_lie(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xe9"))
    root = library(place)
    for out in (tmp_path / "out", tmp_path / "all.parquet"):
        embed(root, out)
        assert folders(out) == {str(place)}
        keys = pq.read_schema(next(iter(out.glob("part-*")), out)).metadata
        assert keys[b"lraee.photos_from"] == os.fsencode(tmp_path) + b"/p\0e9"


# Going on


def test_a_library_that_moved_is_not_embedded_again(tmp_path: Path) -> None:
    root = library(tmp_path / "photos")
    embed(root, tmp_path / "anew" / "out")
    for out in (tmp_path / "out", tmp_path / "all.parquet"):
        embed(root, out)
    root.rename(tmp_path / "moved")
    for out in (tmp_path / "out", tmp_path / "all.parquet"):
        totals = embed(tmp_path / "moved", out, encoder := FakeEncoder())
        assert (totals.embedded, totals.resumed) == (0, 52) and encoder.encoded == 3
        assert folders(out) == {str(tmp_path / "moved")}
        assert rows(out).equals(rows(tmp_path / "anew" / "out"))
        assert not (out / "old").exists()


def test_a_second_run_embeds_nothing(tmp_path: Path) -> None:
    root = library(tmp_path / "photos")
    for out in (tmp_path / "out", tmp_path / "all.parquet"):
        first = embed(root, out)
        before = contents(out)
        encoder = FakeEncoder()
        again = embed(root, out, encoder)
        assert encoder.encoded == (0 if out.suffix == "" else 3)  # three are not finite
        assert (again.embedded, again.resumed) == (0, first.embedded)
        assert again.skipped == first.skipped and contents(out) == before


def test_changed_new_and_deleted_photos(tmp_path: Path) -> None:
    root, out = library(tmp_path / "photos"), tmp_path / "out"
    embed(root, out)
    (root / "album 0" / "0.jpg").write_bytes(b"changed")
    (root / "album 0" / "00.jpg").write_bytes(b"new")
    (root / "album 1" / "4.jpg").unlink()
    totals = embed(root, out, encoder := FakeEncoder())
    embed(root, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")
    assert totals.embedded == 2 and totals.resumed == 50
    assert encoder.encoded == 5  # and three that are not finite
    assert not (out / "old").exists()


def test_a_part_that_is_missing_leaves_those_behind_it(tmp_path: Path) -> None:
    root, out = library(tmp_path / "photos"), tmp_path / "out"
    embed(root, out)
    before = contents(out)
    (out / "part-00001.parquet").unlink()
    totals = embed(root, out, encoder := FakeEncoder())
    assert contents(out) == before and encoder.encoded <= 10
    assert totals.embedded <= 10 and totals.embedded + totals.resumed == 52


def test_fewer_photos_leave_no_part_behind(tmp_path: Path) -> None:
    root, out = library(tmp_path / "photos"), tmp_path / "out"
    embed(root, out)
    for path in (root / "album 2").iterdir():
        path.unlink()
    embed(root, out)
    embed(root, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_other_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    root = library(tmp_path / "photos")
    for out in (tmp_path / "out", tmp_path / "all.parquet"):
        embed(root, out, FakeEncoder(scheme={"attention": "int8"}))
        before = contents(out)
        with pytest.raises(DataError, match="made with scheme.attention 'float', got 'int8'") as e:
            embed(root, out, FakeEncoder(scheme={"attention": "float"}))
        assert "\n" not in str(e.value) and contents(out) == before
        with pytest.raises(DataError, match="made with shard '1/2', got None"):
            embed(root, out, FakeEncoder(scheme={"attention": "int8"}), shard=Shard(1, 2))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    from lraee.serving.output import Output

    with Output(tmp_path / "out"):
        with pytest.raises(DataError, match="must have one run at a time"):
            with Output(tmp_path / "out"):
                pass
    with Output(tmp_path / "out"):
        pass


def _kill_and_go_on(tmp_path: Path, name: str, points: int, seed: int) -> None:
    root = library(tmp_path / "photos")
    whole = tmp_path / "whole" / name
    embed(root, whole)
    rng = random.Random(seed)
    for k in range(points):
        out = tmp_path / str(k) / name
        # A run that is killed several times; the last one may come to its end
        while killed_at(rng.randint(1, 80), lambda out=out: embed(root, out)):
            if rng.random() < 0.3:
                break
        embed(root, out)
        assert contents(out) == contents(whole), (k, name)
        hidden = {path.name for path in out.parent.rglob(".*")} - {".lock"}
        assert not hidden and not list(out.parent.rglob("old"))


@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_killed_runs_go_on_to_the_same_files(tmp_path: Path, name: str) -> None:
    _kill_and_go_on(tmp_path, name, points=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_killed_anywhere_runs_go_on_to_the_same_files(tmp_path: Path, name: str) -> None:
    _kill_and_go_on(tmp_path, name, points=60, seed=1)


@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_killed_while_photos_change(tmp_path: Path, name: str) -> None:
    """A run that retires parts is killed, and the next one gives the files of a new run."""
    root = library(tmp_path / "photos")
    embed(root, tmp_path / "first" / name)
    first = rows(tmp_path / "first" / name)
    for k, call in enumerate((5, 9, 14, 20, 27, 35)):
        photos, out = library(tmp_path / f"photos {k}"), tmp_path / str(k) / name
        embed(photos, out)
        (photos / "album 0" / "00.jpg").write_bytes(b"new")
        killed_at(call, lambda out=out, photos=photos: embed(photos, out))
        embed(photos, out)
        embed(photos, tmp_path / f"anew {k}" / name)
        assert rows(out).equals(rows(tmp_path / f"anew {k}" / name))
        assert len(rows(out)) == len(first) + 1


# Shards


def test_shards_share_the_photos(tmp_path: Path) -> None:
    root = library(tmp_path / "photos")
    embed(root, tmp_path / "all")
    paths: list[str] = []
    reasons: dict[str, str] = {}
    for i in (1, 2, 3):
        embed(root, out := tmp_path / str(i), shard=Shard(i, 3))
        paths += rows(out)["path"].to_pylist()
        reasons |= failures(out)
    assert sorted(paths) == sorted(rows(tmp_path / "all")["path"].to_pylist())
    assert reasons == failures(tmp_path / "all")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "/", "1/0"])
def test_wrong_shards_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shard must be i/n"):
        Shard.parse(text)


def test_parts_hold_no_null(tmp_path: Path) -> None:
    embed(library(tmp_path / "photos"), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert all(table[name].null_count == 0 for name in table.column_names if name != "exit_block")
