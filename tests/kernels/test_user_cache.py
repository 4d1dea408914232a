"""Files of the user's cache: whole or absent, of these kernels alone."""

import pytest

from lraee.kernels import user_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_written_is_read(cache):
    assert user_cache.read("tilings") is None
    path = user_cache.write("tilings", {"rows": [1, 2]})
    assert user_cache.read("tilings") == {"rows": [1, 2]}
    assert path.is_relative_to(cache) and user_cache.kernels_hash() in path.parts


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b"x" * (2 << 20)])
def test_a_file_that_is_none_of_ours_is_not_read(content):
    user_cache.write("tilings", {}).write_bytes(content)
    assert user_cache.read("tilings") is None


def test_a_write_that_fails_leaves_the_file_and_nothing_else():
    path = user_cache.write("tilings", {"rows": 1})
    with pytest.raises(TypeError):
        user_cache.write("tilings", {"rows": object()})
    assert user_cache.read("tilings") == {"rows": 1}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_kernels_read_another_file(monkeypatch):
    user_cache.write("tilings", {"rows": 1})
    monkeypatch.setattr(user_cache, "kernels_hash", lambda: "0" * 16)
    assert user_cache.read("tilings") is None
