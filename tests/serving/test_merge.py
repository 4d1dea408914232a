from pathlib import Path

import pytest

from lraee.data.sources import DataError
from lraee.serving.embed import Shard
from lraee.serving.merge import Merged, merge
from lraee.serving.output import Output
from tests.serving.fake_encoder import FakeEncoder, embed, failures, folders, library, rows


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three finished shards of one library, one of them a file."""
    root = library(tmp_path / "photos")
    outs = [tmp_path / "1", tmp_path / "2.parquet", tmp_path / "3"]
    for i, out in enumerate(outs):
        embed(root, out, shard=Shard(i + 1, 3))
    return outs


def joined(paths: list[Path], out: Path) -> Merged:
    with Output(out) as output:
        return merge(paths, output)


@pytest.mark.parametrize("name", ["out", "all.parquet"])
def test_shards_make_the_whole(tmp_path: Path, shards: list[Path], name: str) -> None:
    embed(tmp_path / "photos", tmp_path / "whole")
    merged = joined([shards[2], shards[0], shards[1]], tmp_path / name)
    totals = merged.totals
    got, whole = rows(tmp_path / name), rows(tmp_path / "whole")
    assert got.sort_by("path").equals(whole.sort_by("path"))
    assert failures(tmp_path / name) == failures(tmp_path / "whole")
    assert totals.embedded == 52 and totals.skipped.total() == 10
    assert merged.photos_from == () and folders(tmp_path / name) == {str(tmp_path / "photos")}


def test_shards_of_two_folders_say_no_folder(tmp_path: Path, shards: list[Path]) -> None:
    library(tmp_path / "mount")
    embed(tmp_path / "mount", tmp_path / "b", shard=Shard(3, 3))
    merged = joined([*shards[:2], tmp_path / "b"], tmp_path / "out")
    assert merged.photos_from == (str(tmp_path / "photos"), str(tmp_path / "mount"))
    assert folders(tmp_path / "out") == {None} and len(rows(tmp_path / "out")) == 52


def test_every_shard_must_be_there_once(tmp_path: Path, shards: list[Path]) -> None:
    with pytest.raises(DataError, match="shards must be 1/3 to 3/3, got 1/3, 3/3"):
        joined([shards[0], shards[2]], tmp_path / "out")
    with pytest.raises(DataError, match="shards must be 1/3 to 3/3, got 1/3, 1/3, 2/3, 3/3"):
        joined([*shards, shards[0]], tmp_path / "out")


def test_an_unfinished_shard_is_refused(tmp_path: Path, shards: list[Path]) -> None:
    (shards[0] / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match="must hold 2 parts, got 1"):
        joined(shards, tmp_path / "out")
    (shards[0] / "failures.parquet").unlink()
    with pytest.raises(DataError, match="must be a finished shard, got no failures.parquet"):
        joined(shards, tmp_path / "out")


def test_other_settings_are_refused(tmp_path: Path, shards: list[Path]) -> None:
    embed(tmp_path / "photos", tmp_path / "other", FakeEncoder(model="b"), shard=Shard(3, 3))
    with pytest.raises(DataError, match="must be made with model 'fake', got 'b'"):
        joined([*shards[:2], tmp_path / "other"], tmp_path / "out")


def test_a_photo_in_two_shards_is_refused(tmp_path: Path, shards: list[Path]) -> None:
    class Everything(Shard):
        def holds(self, candidate: object) -> bool:  # type: ignore[override]
            return True

    embed(tmp_path / "photos", tmp_path / "both", shard=Everything(3, 3))
    with pytest.raises(DataError, match="must hold no photo of another shard, got album"):
        joined([*shards[:2], tmp_path / "both"], tmp_path / "out")


def test_no_shard_and_no_new_place_are_refused(tmp_path: Path, shards: list[Path]) -> None:
    embed(tmp_path / "photos", tmp_path / "whole")
    with pytest.raises(DataError, match="must be made with --shard, got none"):
        joined([tmp_path / "whole"], tmp_path / "out")
    with pytest.raises(DataError, match="must be new"):
        joined(shards, tmp_path / "whole")
    with pytest.raises(DataError, match="must be a Parquet file of lraee's"):
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        (tmp_path / "x.failures.parquet").write_bytes(b"PAR1")
        joined([tmp_path / "x.parquet"], tmp_path / "out")
