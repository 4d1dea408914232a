"""The deployment on Ray Serve; a real cluster of two nodes, one of which is killed under load."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from lraee.serving.ray_serve import Plan, Replica, app, deployment
from lraee.serving.settings import LOOPBACK_NAMES
from tests.serving import test_ray
from tests.serving.conftest import MODEL
from tests.serving.test_server import data_uri

DEADLINE_S = 60.0

two_nodes = test_ray.cluster  # the fixture


def test_plan_reads_words_and_values() -> None:
    words = {"model": "lraee-tiny, ViT-B-32__openai", "cpus": "8", "max_replicas": "4"}
    values = {"model": ["lraee-tiny", "ViT-B-32__openai"], "cpus": 8, "max_replicas": 4}
    expected = Plan(("lraee-tiny", "ViT-B-32__openai"), cpus=8, max_replicas=4)
    assert Plan.of(words) == Plan.of(values) == expected
    assert Plan.of({}) == Plan()
    assert Plan.of({"min_replicas": "3"}).max_replicas == 3
    names = [choice.name for choice in expected.choices()]
    assert names == ["lraee-tiny", "ViT-B-32__openai"]
    settings = expected.settings("0123456789")
    assert (settings.cpus, settings.token) == (8, "0123456789")
    assert settings.allowed_hosts == LOOPBACK_NAMES
    assert Plan(allow_host=("*",)).settings(None).allowed_hosts == ()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "x"}, "arguments must be of model, .*, got 'modle'"),
        ({"cpus": "many"}, "cpus must be a number, got 'many'"),
        ({"cpus": 0}, "cpus >= 1 must hold"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas <= max_replicas"),
        ({"model": ""}, "model must be one name"),
        ({"model": "a,b", "exits": "e"}, "model must be one name with pretrained or exits"),
    ],
)
def test_wrong_arguments_get_one_line(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Plan.of(args)
    assert "\n" not in str(caught.value)


def test_a_dead_worker_fails_the_health_check() -> None:
    replica = Replica()
    service = SimpleNamespace(is_ready=True)
    replica.app = SimpleNamespace(state=SimpleNamespace(service=service))  # type: ignore[assignment]
    asyncio.run(replica.check_health())
    service.is_ready = False
    with pytest.raises(RuntimeError, match="worker does not run"):
        asyncio.run(replica.check_health())


def test_a_short_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_TOKEN", "short")
    with pytest.raises(ValueError, match="at least 8 characters, got 5"):
        app({})


class Load:
    """Clients that send one image after the other."""

    def __init__(self, url: str, body: dict[str, Any], clients: int) -> None:
        self.answers: list[tuple[float, float, int]] = []
        self.rows: list[NDArray[np.float32]] = []
        self.unanswered: list[str] = []
        self._url, self._body, self._clients = url, body, clients
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=2 * DEADLINE_S, limits=limits) as client:
            await asyncio.gather(*(self._client(client) for _ in range(self._clients)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self._is_over.is_set():
            started = time.monotonic()
            try:
                answer = await client.post(f"{self._url}/v1/embeddings", json=self._body)
            except httpx.TransportError as error:
                self.unanswered.append(repr(error))
                continue
            self.answers.append((started, time.monotonic(), answer.status_code))
            if answer.is_success:
                row = answer.json()["data"][0]["embedding"]
                self.rows.append(np.array(row, np.float32))
            else:
                await asyncio.sleep(0.2)


def kill_node(node: Any) -> None:
    """SIGKILL the node's own processes and the workers that it started, all at once."""
    own = [info.process.pid for infos in node.all_processes.values() for info in infos]
    workers = [
        int(child)
        for pid in own
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    for pid in (*own, *workers):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this must come true within {seconds:g} s"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_node_loses_no_request(
    two_nodes: Any,
    photo_files: dict[str, bytes],
    single: Callable[[bytes], NDArray[np.float32]],
) -> None:
    """Load starts the second replica, on the second node; the node is killed under that load."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'lraee[ray]'")
    nodes, second = two_nodes
    image = photo_files["coffee.png"]
    expected = single(image)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(nodes.address, _node_ip_address="127.0.0.2", log_to_driver=False)
    http = {"host": "127.0.0.1", "port": port, "request_timeout_s": DEADLINE_S}
    serve.start(proxy_location="HeadOnly", http_options=http)
    plan = Plan((MODEL,), max_replicas=2, queue_s=1000.0, deadline_s=DEADLINE_S)
    try:
        serve.run(deployment(plan), name="lraee")
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health/ready", timeout=60).json() == {"status": "ready"}

        def replicas() -> int:
            states: dict[Any, int] = (
                serve.status().applications["lraee"].deployments["lraee"].replica_states
            )
            return sum(n for state, n in states.items() if str(state).endswith("RUNNING"))

        assert replicas() == 1
        body = {"model": MODEL, "input": data_uri(image), "modality": "image"}
        with Load(url, body, clients=80) as load:
            wait_for(lambda: replicas() == 2, 180)
            time.sleep(3)
            killed = time.monotonic()
            kill_node(second)
            wait_for(lambda: replicas() == 1, 60)
            time.sleep(3)
    finally:
        serve.shutdown()
    assert load.unanswered == []
    latest = max(end - start for start, end, _ in load.answers)
    assert latest <= DEADLINE_S + 5, "Ray's own timeout answers at the deadline"
    statuses = Counter(status for _, _, status in load.answers)
    assert set(statuses) <= {200, 500, 503}, "500: the replica had the request when it died"
    assert all(np.array_equal(row, expected) for row in load.rows)
    after = [status for start, _, status in load.answers if start > killed + 2]
    assert len(after) > 20 and after.count(200) > 0
