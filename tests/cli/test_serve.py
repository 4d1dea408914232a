"""The commands `lraee serve` and `lraee index`: what they refuse, and what they say."""

import asyncio
import builtins
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from lraee.cli import serve
from lraee.cli.serve import _allowed_hosts, _token
from tests.cli.test_main import one_line, run
from tests.serving import embeddings


@pytest.mark.parametrize("command", ["serve", "index"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"lraee {command}" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--port", "70000"),
        ("serve", "--photos", "/nowhere.parquet"),
        ("serve", "--model", "a", "--model", "b", "--pretrained", "openai"),
        ("serve", "--model", "a", "--model", "b", "--exits", "."),
        ("serve", "--max-batch", "0"),
        ("serve", "--scheme", "int7"),
        ("serve", "--text", "int7"),
        ("index",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_model_that_is_not_there_is_one_line() -> None:
    assert "one of open_clip's" in one_line(run("serve", "--port", 0, "--model", "no-such-model"))


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "orjson", "prometheus_client"])
def test_a_missing_extra_is_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}", name=missing)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    line = one_line(run("serve", "--port", 0))
    assert line == (f"lraee: error: serve: {missing} is not installed: pip install 'lraee[serve]'")


def test_a_port_in_use_is_one_line_before_any_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = one_line(run("serve", "--port", port, "--model", "no-such-model"))
    assert line == (
        "lraee: error: serve: --host and --port must be free to listen on, got"
        f" 127.0.0.1:{port}: Address already in use"
    )


def test_answers_leave_without_nagles_algorithm() -> None:
    """With it every answer waited 40 ms, for its body is a write of its own."""

    async def no_delay() -> int:
        accepted: asyncio.Queue[int] = asyncio.Queue()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.put_nowait(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with serve._bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(answer, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                result = await accepted.get()
                writer.close()
        return result

    assert asyncio.run(no_delay()) == 1


def test_photos_of_another_kind_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "photos.parquet"
    path.write_text("no parquet")
    assert "must be what `lraee embed` wrote" in one_line(
        run("serve", "--port", 0, "--photos", path)
    )
    assert "must be what `lraee embed` wrote" in one_line(run("index", "--check", path))


def test_photos_that_are_elsewhere_are_one_line(tmp_path: Path) -> None:
    rows = np.eye(2, 256, dtype=np.float32)
    path = embeddings.write(tmp_path / "e.parquet", ["a.jpg", "b.jpg"], rows, model="lraee-tiny")
    line = one_line(run("serve", "--port", 0, "--photos", path))
    assert "a.jpg cannot be read" in line or "b.jpg cannot be read" in line
    assert line.endswith("give --photos-from FOLDER")


def test_a_missing_place_of_photos_is_one_line(tmp_path: Path) -> None:
    rows, place = np.eye(1, 256, dtype=np.float32), tmp_path / "moved"
    path = embeddings.write(
        tmp_path / "e.parquet", ["a.jpg"], rows, photos_from=str(place).encode(), model="lraee-tiny"
    )
    line = one_line(run("serve", "--port", 0, "--photos", path))
    assert f"{place}, which the embeddings name as the place of their photos, must exist" in line
    assert line.endswith("give --photos-from FOLDER")


def test_index_prints_recall(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    path = embeddings.write(tmp_path / "e.parquet", [f"{i}.jpg" for i in range(300)], rows)
    result = run("index", "--check", path)
    assert result.exit_code == 0
    assert "300, 16 numbers" in result.stdout
    assert "recall@10       exact: 1.0000" in result.stdout
    assert "recall@10       faiss SQ8: 1.0000" in result.stdout


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRAEE_TOKEN", raising=False)
    assert _token(None) is None
    file = tmp_path / "token"
    file.write_text("correct horse\n")
    assert _token(file) == "correct horse"
    monkeypatch.setenv("LRAEE_TOKEN", "battery staple")
    assert _token(None) == "battery staple"
    for short in ("", "short"):
        file.write_text(short)
        with pytest.raises(typer.BadParameter, match="at least 8"):
            _token(file)


def test_hosts_are_held_on_loopback_alone() -> None:
    assert _allowed_hosts("127.0.0.1", ["photos.example"])[-1] == "photos.example"
    assert "localhost" in _allowed_hosts("::1", [])
    assert _allowed_hosts("0.0.0.0", []) == ()
    assert _allowed_hosts("0.0.0.0", ["photos.example"]) == ("photos.example",)
