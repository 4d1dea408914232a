"""docs/nginx.conf: two servers behind nginx, one of which ends under load."""

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from lraee.serving.encoder import ClipEncoder
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from tests.serving.conftest import MODEL, PATIENT, running
from tests.serving.test_server import data_uri

CONFIG = Path(__file__).parents[2] / "docs" / "nginx.conf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx") is None, reason="needs nginx (apt-get install nginx-light), got none"
    ),
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def nginx(folder: Path, upstreams: list[str]) -> Iterator[str]:
    """nginx with the config of the docs, on free ports."""
    text, port = CONFIG.read_text(), free_port()
    for documented, real in zip(("127.0.0.1:3003", "127.0.0.1:3004"), upstreams, strict=True):
        assert documented in text
        text = text.replace(documented, real)
    text = re.sub(r"listen 127\.0\.0\.1:8080", f"listen 127.0.0.1:{port}", text)
    (folder / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_no_request_is_lost_when_one_of_two_ends(
    tmp_path: Path, encoder: ClipEncoder, photo_files: dict[str, bytes]
) -> None:
    image = photo_files["coffee.png"]
    body = {"model": MODEL, "input": data_uri(image), "modality": "image"}
    expected = encoder.encode("image", [encoder.preprocess(image)])[0].embedding
    rows: list[np.ndarray] = []
    statuses: list[int] = []
    is_over = threading.Event()

    def client(url: str) -> None:
        while not is_over.is_set():
            answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60)
            statuses.append(answer.status_code)
            if answer.is_success:
                row = answer.json()["data"][0]["embedding"]
                rows.append(np.array(row, np.float32))

    with running(create_app([encoder], Settings(**PATIENT))) as first:
        with running(create_app([encoder], Settings(**PATIENT))) as second:
            upstreams = [each.url.removeprefix("http://") for each in (first, second)]
            with nginx(tmp_path, upstreams) as url:
                threads = [threading.Thread(target=client, args=(url,)) for _ in range(8)]
                for thread in threads:
                    thread.start()
                time.sleep(2)
                second.stop()
                time.sleep(2)
                is_over.set()
                for thread in threads:
                    thread.join(60)
    assert len(statuses) > 20 and set(statuses) == {200}
    assert all(np.array_equal(row, expected) for row in rows)
