"""What the server counts: CPU by part."""

import threading
import time

from lraee.serving.metrics import CpuSplit, Metrics
from tests.serving.conftest import MODEL, Running
from tests.serving.test_server import data_uri


def spend(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def value(metrics: Metrics, part: str) -> float:
    seconds = metrics.registry.get_sample_value("lraee_cpu_seconds_total", {"part": part})
    assert seconds is not None
    return seconds


def test_cpu_of_a_thread_is_split_without_a_rest() -> None:
    """Work and the rest together are the thread's own clock at the end of its last work."""
    metrics = Metrics()
    split = metrics.cpu_split("decode")
    ends: list[float] = []

    def work() -> None:
        for inside, outside in ((0.02, 0.01), (0.01, 0.0)):
            with split.working():
                spend(inside)
            ends.append(time.thread_time())
            spend(outside)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    decode, rest = value(metrics, "decode"), value(metrics, "threads")
    assert decode >= 2 * 0.03 and rest >= 2 * 0.01
    total = ends[1] + ends[3]
    assert 0 <= total - decode - rest < 0.01 * total + 0.001


def test_work_that_fails_is_counted() -> None:
    metrics = Metrics()
    split: CpuSplit = metrics.cpu_split("model")
    try:
        with split.working():
            spend(0.01)
            raise ValueError
    except ValueError:
        pass
    assert value(metrics, "model") >= 0.01


def test_a_request_counts_its_decoding_and_its_model(
    server: Running, photo_files: dict[str, bytes]
) -> None:
    before = [value(server.service.metrics, part) for part in ("decode", "model", "threads")]
    body = {"model": MODEL, "input": data_uri(photo_files["coffee.png"]), "modality": "image"}
    with server.client() as client:
        assert client.post("/v1/embeddings", json=body).status_code == 200
        text = client.get("/metrics").text
    after = [value(server.service.metrics, part) for part in ("decode", "model", "threads")]
    assert all(end > start for start, end in zip(before, after, strict=True))
    assert 'lraee_cpu_seconds_total{part="decode"}' in text
