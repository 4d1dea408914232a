"""Many hostile requests, then a good one with the same bits."""

import itertools
import json
import logging
import re
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lraee.serving.encoder import ClipEncoder
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from tests.serving.conftest import MODEL, PATIENT, Running, running
from tests.serving.hostile import requests
from tests.serving.test_server import data_uri

# uvicorn's own refusals of what is no HTTP are plain text
_PLAIN = (b"Invalid HTTP request received.", b"")


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def send(server: Running, data: bytes) -> tuple[int, bytes]:
    """Status and body; 0 where the server waits for more, or closed without an answer."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(data)
            # blank lines before a head are no head: the server would wait for the rest of one
            if b"\r\n\r\n" not in data.lstrip(b"\r\n"):
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(1 << 16):
                answer += chunk
        except (ConnectionError, BrokenPipeError):
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    # what follows a body that was too long is a second request, with its own answer
    return int(match[1]) if match else 0, body[: int(length[1])] if length else body


def attack(server: Running, count: int) -> Counter[int]:
    """Statuses of so many hostile requests, eight at a time; each answer is checked."""
    with ThreadPoolExecutor(8) as pool:
        data = itertools.islice(requests(), count)
        answers = list(pool.map(lambda each: send(server, each), data))
    for status, body in answers:
        assert status < 500 or status in (501, 503, 505), (status, body)
        assert b"Traceback" not in body and b"/lraee/" not in body
        if status >= 400 and body not in _PLAIN:
            assert "\n" not in json.loads(body)["error"]["message"]
    return Counter(status for status, _ in answers)


def check(
    encoder: ClipEncoder, data: bytes, expected: NDArray[np.float32], *, count: int, growth: int
) -> None:
    app = create_app([encoder], Settings(body_s=1.0, **PATIENT))
    with running(app) as server, server.client() as client:
        attack(server, 40)  # what is allocated once is no growth
        before = resident_bytes()
        statuses = attack(server, count)
        assert resident_bytes() - before < growth
        body = {"model": MODEL, "input": data_uri(data), "modality": "image"}
        row = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        assert np.array_equal(np.array(row, np.float32), expected)
        assert client.get("/health/ready").status_code == 200
        admission = server.service.admission
        assert admission.work_s == 0 and admission.body_bytes == 0
        assert server.service.models[MODEL].batcher.depth == 0
    assert {400, 413, 415, 422} <= set(statuses) and sum(statuses.values()) == count


Single = Callable[[bytes], NDArray[np.float32]]


def test_sixty_hostile_requests_then_a_good_one(
    encoder: ClipEncoder, photo_files: dict[str, bytes], single: Single,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = photo_files["rocket.jpg"]
    check(encoder, data, single(data), count=60, growth=256 << 20)
    failures = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert not failures, failures


@pytest.mark.slow
def test_a_thousand_hostile_requests_then_a_good_one(
    encoder: ClipEncoder, photo_files: dict[str, bytes], single: Single
) -> None:
    data = photo_files["rocket.jpg"]
    check(encoder, data, single(data), count=1000, growth=256 << 20)
