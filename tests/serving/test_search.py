"""What the page asks for: only rows, never paths; searches; the cookie."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lraee.serving.encoder import ClipEncoder
from lraee.serving.search.library import Library, read_embeddings
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from tests.serving import embeddings
from tests.serving.conftest import PATIENT, Running, running, write_photos
from tests.serving.test_server import error_of

HOSTILE = '<img src=x onerror="document.title=1">&amp;.png'


def make_library(folder: Path, encoder: ClipEncoder, files: dict[str, bytes]) -> Library:
    """The photos in a folder, embedded, beside one with a hostile name and one that is missing."""
    files = {**files, HOSTILE: files["camera.png"]}
    write_photos(folder, files)
    rows = [encoder.encode("image", [encoder.preprocess(data)])[0] for data in files.values()]
    matrix = np.stack([row.embedding for row in rows])
    sizes = [encoder.preprocess.with_size(data)[1][::-1] for data in files.values()]
    path = embeddings.write(
        folder / "embeddings.parquet", [*files, "missing.png"],
        np.concatenate([matrix, -matrix[:1]]),
        [*sizes, (40, 30)], model=encoder.opened.title, weights=encoder.weights,
    )  # fmt: skip
    return Library(read_embeddings(path))


@pytest.fixture(scope="module")
def library(
    tmp_path_factory: pytest.TempPathFactory, encoder: ClipEncoder, photo_files: dict[str, bytes]
) -> Library:
    return make_library(tmp_path_factory.mktemp("photos"), encoder, photo_files)


@pytest.fixture(scope="module")
def page(library: Library, encoder: ClipEncoder) -> Iterator[Running]:
    kept = library.embeddings.folder / "thumbnails"
    with running(create_app([encoder], Settings(**PATIENT), library, thumbnails=kept)) as server:
        yield server


def test_a_known_photo_ranks_first(page: Running) -> None:
    with page.client() as client:
        answer = client.get("/search", params={"q": "an espresso", "k": 3}).json()
    assert answer["results"][0]["name"] == "coffee.png"
    assert (answer["results"][0]["width"], answer["results"][0]["height"]) == (600, 400)
    assert len(answer["results"]) == 3 and answer["text_ms"] > 0
    scores = [row["score"] for row in answer["results"]]
    assert scores == sorted(scores, reverse=True)


def test_more_like_this(page: Running, library: Library) -> None:
    camera = library.embeddings.names.index("camera.png")
    with page.client() as client:
        answer = client.get("/search", params={"like": camera}).json()
    assert answer["results"][0]["name"] == HOSTILE  # the same photo
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert answer["like"]["name"] == "camera.png"
    assert camera not in [row["row"] for row in answer["results"]]


def test_without_a_query_photos_are_shown(page: Running, library: Library) -> None:
    with page.client() as client:
        rows = client.get("/search").json()["results"]
        few = client.get("/search", params={"k": 4}).json()["results"]
        about = client.get("/library").json()
    assert [row["row"] for row in rows] == list(range(len(library)))
    assert [row["row"] for row in few] == [0, 3, 6, 9]
    assert about == {"photos": 15, "model": "lraee-tiny"}


def test_photos_are_read_by_row_alone(
    page: Running, library: Library, photo_files: dict[str, bytes]
) -> None:
    coffee = library.embeddings.names.index("coffee.png")
    with page.client() as client:
        photo, thumbnail = client.get(f"/photos/{coffee}"), client.get(f"/thumbnails/{coffee}")
        assert photo.content == photo_files["coffee.png"]
        assert photo.headers["content-type"] == "image/png"
        assert thumbnail.headers["content-type"] == "image/jpeg"
        for answer in (photo, thumbnail):
            assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
            assert answer.headers["x-content-type-options"] == "nosniff"
        missing = library.embeddings.names.index("missing.png")
        for path in (
            f"/photos/{missing}",
            f"/thumbnails/{missing}",
            "/photos/99",
            "/photos/999999999",
        ):
            error_of(client.get(path), 404)
        for path in ("/photos/-1", "/photos/coffee.png", "/photos/%2e%2e", "/photos/1e1"):
            error_of(client.get(path), 400)
        for path in ("/page/../search.py", "/page/%2e%2e%2fserver.py", "/page/x", "/coffee.png"):
            error_of(client.get(path), 404)


def test_the_page_brings_all_it_needs(page: Running) -> None:
    with page.client() as client:
        html = client.get("/")
        policy = html.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        for name in ("page.css", "page.js", "icon.svg"):
            assert f"/page/{name}" in html.text
            assert client.get(f"/page/{name}").status_code == 200
    assert "http://" not in html.text and "https://" not in html.text


def test_bad_searches(page: Running) -> None:
    with page.client() as client:
        error_of(client.get("/search", params={"like": "x"}), 400)
        error_of(client.get("/search", params={"like": 99}), 404)
        error_of(client.get("/search", params={"k": "-1"}), 400)
        error_of(client.get("/search", params={"q": "x" * 5000}), 413)
        assert client.get("/search", params={"k": 10**8}).status_code == 200


def test_a_token_is_taken_once_and_a_cookie_opens_photos_alone(
    encoder: ClipEncoder, library: Library, tmp_path: Path
) -> None:
    app = create_app([encoder], Settings(token="correct horse"), library, thumbnails=tmp_path)
    with running(app) as server, server.client() as client:
        assert client.get("/").status_code == client.get("/page/page.js").status_code == 200
        error_of(client.get("/search"), 401)
        error_of(client.post("/login", json={"token": "wrong"}), 401)
        error_of(client.post("/login", json={"token": None}), 401)
        answer = client.post("/login", json={"token": "correct horse"})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "correct" not in cookie
        assert client.get("/search").status_code == client.get("/photos/0").status_code == 200
        error_of(client.post("/v1/embeddings", json={}), 401)


def test_embeddings_of_another_model_are_refused(encoder: ClipEncoder, tmp_path: Path) -> None:
    rows = np.eye(3, 256, dtype=np.float32)
    for about in ({"model": "other"}, {"model": "lraee-tiny", "weights": "0" * 64}):
        path = embeddings.write(tmp_path / "e.parquet", list("abc"), rows, **about)
        with pytest.raises(ValueError, match="serve: --model must be"):
            create_app([encoder], library=Library(read_embeddings(path)))
    narrow: Any = embeddings.write(tmp_path / "n.parquet", list("abc"), np.eye(3, 8, dtype="f4"))
    with pytest.raises(ValueError, match="serve: --model must be"):
        create_app([encoder], library=Library(read_embeddings(narrow)))
