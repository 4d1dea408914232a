"""Overload, clients that leave, deadlines, a worker that dies, and the end of a server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch

from lraee.serving.server import create_app
from lraee.serving.service import Service
from lraee.serving.settings import Settings
from tests.serving.conftest import MODEL, Running, running
from tests.serving.held_encoder import FakeEncoder
from tests.serving.test_server import error_of

ROOT = Path(__file__).parents[2]


class FakeClip(FakeEncoder):
    """A FakeEncoder that a server takes: texts are numbers or "die", images are black."""

    name, width, image_size, logit_scale, weights = "fake", 4, (2, 2), 100.0, None
    opened = SimpleNamespace(title="fake")
    preprocess = SimpleNamespace(with_options=lambda limits: None)

    def encode(self, kind: Any, payloads: Any) -> Any:
        plain = [0 if torch.is_tensor(p) else _plain(p) for p in payloads]
        return super().encode(kind, plain)


def _plain(text: str) -> object:
    return int(text) if text.isdecimal() else (text if text == "die" else 0)


def ask(server: Running, text: str) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/embeddings", json={"model": "fake", "input": text})


def serve_fake(**options: Any) -> Any:
    encoder = FakeClip()
    return encoder, running(create_app([encoder], Settings(**options)))  # type: ignore[list-item]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("this must come true within ten seconds")


def hold(server: Running, encoder: FakeClip, pool: ThreadPoolExecutor) -> Any:
    """A request that holds the worker until the gate opens."""
    encoder.gate.clear()
    encoder.started.clear()
    first = pool.submit(ask, server, "1")
    assert encoder.started.wait(10)
    return first


def batcher_of(server: Running) -> Any:
    return server.service.models["fake"].batcher


def test_overload_gets_429_and_when_to_come_again() -> None:
    encoder, context = serve_fake(queue_s=3.0)
    with context as server, ThreadPoolExecutor(4) as pool:
        first = hold(server, encoder, pool)
        batcher_of(server)._seconds["text"] = 1.9
        second = pool.submit(ask, server, "2")
        wait_for(lambda: batcher_of(server).depth == 1)
        refused = ask(server, "3")
        # the first was admitted before its time was known
        assert "s of work wait" in error_of(refused, 429)
        assert refused.headers["retry-after"] == "1"
        encoder.gate.set()
        assert first.result().status_code == second.result().status_code == 200
        assert ask(server, "4").status_code == 200
        assert server.service.admission.work_s == 0


def test_more_than_the_deadline_allows_gets_413() -> None:
    _, context = serve_fake(deadline_s=3.0)
    with context as server, server.client() as client:
        batcher_of(server)._seconds["text"] = 2.0
        texts = {"model": "fake", "input": ["1", "2"]}
        assert "send fewer" in error_of(client.post("/v1/embeddings", json=texts), 413)
        assert ask(server, "1").status_code == 200


def test_bodies_in_flight_are_bounded() -> None:
    encoder, context = serve_fake(inflight_bytes=1000, body_bytes=900)
    with context as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(lambda: None)
        encoder.gate.clear()
        encoder.started.clear()
        body = {"model": "fake", "input": "1", "user": "x" * 700}
        with server.client() as client:
            first = pool.submit(client.post, "/v1/embeddings", json=body)
            assert encoder.started.wait(10)
            with server.client() as other:
                error_of(other.post("/v1/embeddings", json=body), 429)
            encoder.gate.set()
            assert first.result().status_code == 200
        assert server.service.admission.body_bytes == 0


def test_a_client_that_leaves_takes_its_inputs_out_of_the_queue() -> None:
    encoder, context = serve_fake()
    with context as server, ThreadPoolExecutor(4) as pool:
        first = hold(server, encoder, pool)
        body = b'{"model": "fake", "input": ["7", "8"]}'
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_for(lambda: batcher_of(server).depth == 2)
        wait_for(lambda: server.service.admission.body_bytes < len(body))
        last = pool.submit(ask, server, "9")
        wait_for(lambda: batcher_of(server).depth == 3)
        encoder.gate.set()
        assert first.result().status_code == last.result().status_code == 200
        assert [[1], [9]] == encoder.batches[-2:]
        assert server.service.admission.work_s == 0


def test_inputs_past_their_deadline_get_504() -> None:
    encoder, context = serve_fake(deadline_s=0.3)
    with context as server, ThreadPoolExecutor(4) as pool:
        first = hold(server, encoder, pool)
        late = pool.submit(ask, server, "2")
        wait_for(lambda: batcher_of(server).depth == 1)
        time.sleep(0.4)
        encoder.gate.set()
        assert first.result().status_code == 200
        assert "deadline" in error_of(late.result(), 504)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_turns_readiness_red() -> None:
    encoder, context = serve_fake()
    with context as server, server.client() as client:
        assert client.get("/health/ready").status_code == 200
        error_of(ask(server, "die"), 503)
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/v2/health/ready").json() == {"ready": False}
        assert client.get("/v2/models/fake/ready").status_code == 503
        error_of(client.get("/ping"), 503)
        assert client.get("/health/live").status_code == 200
        refused = ask(server, "1")
        error_of(refused, 503)
        assert int(refused.headers["retry-after"]) > 0


def test_a_slow_body_gets_408() -> None:
    _, context = serve_fake(body_s=0.2)
    with context as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_class_rows_are_kept() -> None:
    async def scene() -> None:
        encoder = FakeClip()
        service = Service([encoder], Settings())  # type: ignore[list-item]
        service.start()
        model = service.models["fake"]
        first = await service.class_rows(model, ["5", "6", "5"])
        again = await service.class_rows(model, ["6", "7"])
        assert encoder.batches == [[5], [6], [7]]
        assert np.array_equal(first[:, 0], [5, 6, 5]) and np.array_equal(again[:, 0], [6, 7])
        await service.close()

    asyncio.run(scene())


def test_sigterm_finishes_accepted_requests(photo_files: dict[str, bytes]) -> None:
    """`lraee serve` as a user starts it; SIGTERM while sixteen requests are on their way."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lraee", "serve", "--port", "0", "--queue-s", "1000",
         "--deadline-s", "600"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    ready = next((row for row in process.stdout if row.startswith("ready")), "")
    url = ready.split()[1]
    body = {"model": MODEL, "input": [f"a photo of {i} cats" for i in range(20)]}
    answers: list[int] = []

    def request() -> None:
        answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=request) for _ in range(16)]
    for thread in threads:
        thread.start()
    metrics = ""
    while "lraee_wait_seconds_count" not in metrics or float(_value(metrics)) < 10:
        metrics = httpx.get(f"{url}/metrics").text
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 16
    assert process.wait(60) == 0
    assert process.stderr is not None and "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health/live")


def _value(metrics: str) -> str:
    rows = metrics.splitlines()
    return next(r for r in rows if r.startswith("lraee_wait_seconds_count")).rsplit(" ", 1)[1]


def test_json_survives_as_it_is() -> None:
    """The fake's rows are those of the OpenAI shape."""
    encoder, context = serve_fake()
    with context as server:
        answer = ask(server, "3")
        assert json.loads(answer.content)["data"][0]["embedding"] == [3.0, 1.0, 1.0, 1.0]
        assert encoder.batches[-1] == [3]
