"""Search: exact against a sort, faiss against exact, hostile rows."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lraee.data.sources import DataError
from lraee.serving.search.index import Exact, Quantized, make_index, recall
from lraee.serving.search.library import Library, read_embeddings
from lraee.serving.search.thumbnails import Thumbnails
from tests.serving import embeddings
from tests.serving.conftest import write_photos


def unit_rows(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def clusters(count: int, width: int) -> NDArray[np.float32]:
    """Rows in tight groups of a hundred, which graphs find hard."""
    centres = unit_rows(count // 100, width).repeat(100, axis=0)
    rows = centres + 0.1 * unit_rows(len(centres), width, seed=1)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def test_exact_is_a_sort_of_all_products() -> None:
    rows, query = unit_rows(500, 16), unit_rows(1, 16, seed=2)[0]
    hits = Exact(rows).search(query, 20)
    products = rows @ query
    order = np.argsort(-products, kind="stable")[:20]
    assert hits.rows.tolist() == order.tolist()
    assert np.array_equal(hits.scores, products[order])


def test_equal_rows_come_in_their_order_and_bad_ones_never() -> None:
    rows = np.tile(unit_rows(1, 8), (6, 1))
    rows[2] = np.nan
    for index in (Exact(rows), Quantized(rows)):
        hits = index.search(rows[0], 10)
        assert hits.rows.tolist() == [0, 1, 3, 4, 5]
        assert index.search(rows[0], 0).rows.tolist() == []


def test_quantized_finds_what_exact_finds() -> None:
    rows = clusters(3000, 32)
    index = Quantized(rows)
    assert recall(index, rows, queries=60) >= 0.999
    exact, quantized = Exact(rows).search(rows[7], 5), index.search(rows[7], 5)
    # the candidates' scores are exact; BLAS may sum one row in another order than many
    assert np.allclose(exact.scores, quantized.scores, rtol=0, atol=1e-6)


def test_faiss_serves_beyond_the_bound() -> None:
    rows = unit_rows(300, 8)
    assert isinstance(make_index(rows), Exact)
    assert isinstance(make_index(rows, exact_up_to=299), Quantized)


def test_embeddings_are_read_as_written(tmp_path: Path) -> None:
    rows = unit_rows(3, 8)
    names = ["a.jpg", "b\0ff.jpg", "ü/c.jpg"]
    path = embeddings.write(tmp_path / "e.parquet", names, 3 * rows, model="m", weights="w")
    stored = read_embeddings(path)
    assert np.allclose(stored.rows, rows, rtol=0, atol=1e-6)
    assert stored.names == ["a.jpg", "b\udcff.jpg", "ü/c.jpg"]
    assert (stored.model, stored.weights, stored.folder) == ("m", "w", tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(2):
        embeddings.write(parts / f"part-0000{i}.parquet", names, rows, model="m")
    assert len(read_embeddings(parts).names) == 6


def test_no_photos_are_an_index_too(tmp_path: Path) -> None:
    path = embeddings.write(tmp_path / "e.parquet", [], np.empty((0, 8), np.float32))
    stored = read_embeddings(path)
    assert stored.rows.shape == (0, 8)
    for index in (Exact(stored.rows), Quantized(stored.rows)):
        assert index.search(unit_rows(1, 8)[0], 5).rows.tolist() == []
        assert recall(index, stored.rows) == 0


@pytest.mark.parametrize("damage", ["text", "cut", "columns"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "e.parquet"
    embeddings.write(path, ["a"], unit_rows(1, 8))
    if damage == "text":
        path.write_text("path,embedding\n")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "columns":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"path": ["a"]}), path)
    with pytest.raises(DataError, match=r"search: .*e\.parquet must be what `lraee embed`") as e:
        read_embeddings(path)
    assert "\n" not in str(e.value)


def test_only_indexed_names_inside_the_folder_are_read(
    tmp_path: Path, photo_files: dict[str, bytes]
) -> None:
    root = tmp_path / "photos"
    write_photos(root, {"coffee.png": photo_files["coffee.png"]})
    (tmp_path / "secret.png").write_bytes(b"secret")
    names = ["coffee.png", "../secret.png", str(tmp_path / "secret.png"), "a\0b", "missing.png"]
    path = embeddings.write(tmp_path / "e.parquet", names, unit_rows(5, 8))
    library = Library(read_embeddings(path), root)
    assert library.read(0) == photo_files["coffee.png"]
    for row in range(1, 5):
        with pytest.raises(DataError):
            library.read(row)
    # a list of absolute paths names its files itself
    assert Library(read_embeddings(path)).read(2) == b"secret"


def test_titles_hide_the_folders_of_the_server(tmp_path: Path) -> None:
    for names, titles in (
        (["/home/me/a/1.jpg", "/home/me/b/2.jpg"], ["a/1.jpg", "b/2.jpg"]),
        (["/1.jpg", "/b/2.jpg"], ["1.jpg", "b/2.jpg"]),
        (["/home/me/1.jpg"], ["1.jpg"]),
        (["a/1.jpg", "a/\0ff.jpg"], ["a/1.jpg", "a/?.jpg"]),
    ):
        path = embeddings.write(tmp_path / "e.parquet", names, unit_rows(len(names), 8))
        library = Library(read_embeddings(path))
        assert [library.title(row) for row in range(len(names))] == titles


def test_similar_leaves_the_row_itself_out(tmp_path: Path) -> None:
    rows = unit_rows(4, 8)
    path = embeddings.write(tmp_path / "e.parquet", list("abcd"), rows)
    hits = Library(read_embeddings(path)).similar(1, 10)
    assert sorted(hits.rows.tolist()) == [0, 2, 3]


def test_thumbnails_are_made_once_and_kept(tmp_path: Path, photo_files: dict[str, bytes]) -> None:
    from io import BytesIO

    from PIL import Image

    root = tmp_path / "photos"
    write_photos(root, {"astronaut.png": photo_files["astronaut.png"], "bad.png": b"no image"})
    path = embeddings.write(root / "e.parquet", ["astronaut.png", "bad.png"], unit_rows(2, 8))
    thumbnails = Thumbnails(Library(read_embeddings(path)), tmp_path / "kept")
    data = thumbnails.jpeg(0)
    assert Image.open(BytesIO(data)).size == (400, 400)  # 512 x 512 in a box of 640 x 400
    (root / "astronaut.png").unlink()
    assert thumbnails.jpeg(0) == data
    assert len(list((tmp_path / "kept").rglob("*.jpg"))) == 1
    with pytest.raises(DataError):
        thumbnails.jpeg(1)


def test_photos_lie_where_the_embeddings_say(tmp_path: Path) -> None:
    """The key that `lraee embed` writes; a folder that is given counts more."""
    for folder in (b"one", b"two", b"caf\xe9"):
        place = os.path.join(os.fsencode(tmp_path), folder)
        os.mkdir(place)
        with open(os.path.join(place, b"a.jpg"), "wb") as file:
            file.write(folder)
    rows, out = np.eye(1, 4, dtype=np.float32), tmp_path / "out"
    out.mkdir()

    def library(origin: str, source: Path | None = None) -> Library:
        stored = f"{tmp_path}/{origin}".encode()
        path = embeddings.write(out / "e.parquet", ["a.jpg"], rows, photos_from=stored)
        return Library(read_embeddings(path), source)

    assert library("one").read(0) == b"one"
    assert library("one", tmp_path / "two").read(0) == b"two"
    assert library("caf\0e9").read(0) == b"caf\xe9"
    with pytest.raises(DataError, match=f"{tmp_path}/three, which .* must exist; give --photos"):
        library("three")
    assert library("three", tmp_path / "two").read(0) == b"two"
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(DataError, match="must exist"):
        library("one")


@pytest.mark.parametrize("place", [b"photos", b"", b"/a\0b", b"\xff"])
def test_a_place_that_is_no_absolute_path_is_refused(tmp_path: Path, place: bytes) -> None:
    rows = np.eye(1, 4, dtype=np.float32)
    path = embeddings.write(tmp_path / "e.parquet", ["a.jpg"], rows, photos_from=place)
    with pytest.raises(DataError, match="must be what `lraee embed` wrote"):
        read_embeddings(path)


def test_parts_of_several_places_name_none(tmp_path: Path) -> None:
    rows = np.eye(1, 4, dtype=np.float32)
    for i, place in enumerate((b"/one", b"/two")):
        name = tmp_path / f"part-0000{i}.parquet"
        embeddings.write(name, [f"{i}.jpg"], rows, photos_from=place)
    assert read_embeddings(tmp_path).photos_from is None
