import io
import os
import pickle
import random
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

from lraee.data.sources import DataError, Limits, Skipped
from lraee.serving.listing import Candidate, Listing, TextListing, open_listing, split_paths


def listed(listing: Listing) -> tuple[list[Candidate], dict[str, str]]:
    rows = list(listing)
    candidates = [row for row in rows if isinstance(row, Candidate)]
    assert listing.count() in (None, len(candidates))
    return candidates, {row.name: row.reason for row in rows if isinstance(row, Skipped)}


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"12345")
    (tmp_path / "b.txt").touch()
    os.symlink("gone", tmp_path / "c.jpg")
    os.utime(tmp_path / "a" / "x.jpg", ns=(0, 1_234_567_891))
    listing = open_listing([str(tmp_path)], Limits())
    candidates, skipped = listed(listing)
    assert candidates == [Candidate("a/x.jpg", 5, 1_234_567), Candidate("c.jpg", -1, 0)]
    assert skipped == {"b.txt": "has no photo's suffix"}
    assert listing.read(candidates[0]) == b"12345"
    with pytest.raises(FileNotFoundError):
        listing.read(candidates[1])


def test_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("b/a.jpg", (2026, 1, 2, 3, 4, 6)), b"data")
        archive.writestr("a\u202f.jpg", b"other")
        archive.writestr("@eaDir/a.jpg", b"")
    listing = open_listing([str(tmp_path / "x.zip")], Limits())
    candidates, skipped = listed(listing)
    assert [row.name for row in candidates] == ["a\u202f.jpg", "b/a.jpg"]
    assert candidates[1].mtime_us == 1_767_323_046_000_000 and candidates[1].size == 4
    assert skipped == {"@eaDir/a.jpg": "lies in a system folder"}
    again = pickle.loads(pickle.dumps(listing))
    assert [again.read(row) for row in candidates] == [b"other", b"data"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_shards(tmp_path: Path, form: int) -> None:
    long = "f" * 60 + "/" + "g" * 60 + ".jpg"
    tar(tmp_path / "1.tar", {"./0.jpg": b"a", "0.json": b"{}", long: b"b" * 5000}, form)
    tar(tmp_path / "0.tar", {"0.jpg": b"c", "0.JPG": b"d", "../up.jpg": b""}, form)
    listing = open_listing([str(tmp_path / "*.tar")], Limits())
    candidates, skipped = listed(listing)
    assert [row.name for row in candidates] == [
        "0.tar/0.jpg", "0.tar/0.JPG", "1.tar/./0.jpg", f"1.tar/{long}",
    ]  # fmt: skip
    assert [listing.read(row) for row in candidates] == [b"c", b"d", b"a", b"b" * 5000]
    assert candidates[0].mtime_us == 1_700_000_000_000_000
    assert skipped == {
        "0.tar/../up.jpg": "has an unsafe name", "1.tar/0.json": "has no photo's suffix",
    }  # fmt: skip
    one = open_listing([str(tmp_path / "0.tar")], Limits())
    assert [row.name for row in listed(one)[0]] == ["0.tar/0.jpg", "0.tar/0.JPG"]


def test_odd_tar_members_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for data in (b"first", b"second"):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    candidates, skipped = listed(open_listing([str(path)], Limits()))
    assert [row.name for row in candidates] == ["x.tar/a.jpg"]
    assert skipped == {
        "x.tar/l.jpg": "is not a regular file", "x.tar/f.jpg": "is not a regular file",
        "x.tar/a.jpg": "is there twice",
    }  # fmt: skip


def test_damaged_tars_never_end_a_run(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = tar(tmp_path / "w.tar", {f"{i}.jpg": rng.randbytes(700) for i in range(6)}).read_bytes()
    path = tmp_path / "x.tar"
    for k in range(150):
        data = bytearray(whole[: rng.randrange(len(whole))] if k % 3 == 0 else whole)
        for _ in range(rng.randint(0, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        listing = open_listing([str(path)], Limits(file_size_bytes=1 << 20))
        for row in listed(listing)[0]:
            try:
                assert len(listing.read(row)) <= row.size
            except DataError as error:
                assert "\n" not in str(error)
    path.write_bytes(b"not a tar" * 200)
    _, skipped = listed(open_listing([str(path)], Limits()))
    assert skipped["x.tar"].startswith("is damaged, the rest of it is lost: ")


def test_a_list_of_paths(tmp_path: Path) -> None:
    photo = tmp_path / "a\u202f \xe9.jpeg"
    photo.write_bytes(b"x")
    (tmp_path / "list.txt").write_bytes(b"%s\r\n\nno suffix\n%s\n" % ((os.fsencode(photo),) * 2))
    candidates, skipped = listed_list(open_listing([str(tmp_path / "list.txt")], Limits()))
    assert [row.name for row in candidates] == [str(photo), "no suffix"]
    assert candidates[0].size == 1 and candidates[1].size == -1
    assert skipped == {str(photo): "is listed twice"}


def listed_list(listing: Listing) -> tuple[list[Candidate], dict[str, str]]:
    """Of a list the count includes what is listed twice."""
    rows = list(listing)
    assert listing.count() == len(rows)
    candidates = [row for row in rows if isinstance(row, Candidate)]
    return candidates, {row.name: row.reason for row in rows if isinstance(row, Skipped)}


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"a\nb\r\nc", [b"a", b"b", b"c"]),
        (b"a\0b\nb\0", [b"a", b"b\nb", b""]),
        (b"", [b""]),
        (b"\xff\n", [b"\xff", b""]),
        (b"x" * 70_000 + b"\n" + b"y" * 70_000 + b"\nz", [b"x" * 70_000, b"y" * 70_000, b"z"]),
    ],
)
def test_paths_end_with_a_line_or_a_nul(data: bytes, paths: list[bytes]) -> None:
    assert list(split_paths(io.BytesIO(data))) == paths


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(DataError, match="must hold paths of at most 1048576 bytes"):
        list(split_paths(io.BytesIO(b"x" * (3 << 20))))


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("a cat\r\n\n\u0646\u0627\u0645\u0647\n".encode() + b"\xff\na cat")
    listing = TextListing(path)
    candidates, skipped = listed(listing)
    assert [row.name for row in candidates] == ["a cat", "\u0646\u0627\u0645\u0647", "a cat"]
    assert listing.read(candidates[1]).decode() == "\u0646\u0627\u0645\u0647"
    assert skipped == {"line 2": "is empty", "line 4": "is not UTF-8"}


def test_what_is_no_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a folder, a ZIP, .* got no such thing"):
        open_listing([str(tmp_path / "missing")], Limits())
    (tmp_path / "a.bin").write_bytes(b"x")
    with warnings.catch_warnings(), pytest.raises(DataError, match="must be a ZIP file"):
        warnings.simplefilter("error")
        open_listing([str(tmp_path / "a.bin")], Limits())
    with pytest.raises(DataError, match="must be one, or several .tar, got 2 of others"):
        open_listing([str(tmp_path), str(tmp_path)], Limits())
