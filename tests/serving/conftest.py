"""One model for all tests of the server, and servers on loopback in a thread of the test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette

from lraee.evaluation.demo import sample_photos
from lraee.serving.encoder import ClipEncoder, ModelChoice
from lraee.serving.server import create_app
from lraee.serving.service import Service
from lraee.serving.settings import Settings

MODEL = "lraee-tiny"
PATIENT = {"queue_s": 1000.0, "deadline_s": 600.0}
"""No answer of a test depends on how busy the machine is."""


@pytest.fixture(scope="session")
def encoder() -> ClipEncoder:
    """lraee-tiny, accelerated."""
    return ModelChoice(MODEL).open()


@pytest.fixture(scope="session")
def photo_files() -> dict[str, bytes]:
    """scikit-image's photos by name."""
    photos = sample_photos()
    return {name: photos._source.read(name) for name in photos.names}


@dataclass(frozen=True)
class Running:
    """A server on loopback."""

    url: str
    app: Starlette
    stop: Callable[[], None]

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@contextmanager
def running(app: Starlette) -> Iterator[Running]:
    """Serve the app until the end of the context."""
    config = uvicorn.Config(
        app, port=0, log_level="warning", lifespan="on", timeout_graceful_shutdown=20, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def stop() -> None:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"

    yield Running(f"http://127.0.0.1:{port}", app, stop)
    stop()


@pytest.fixture(scope="session")
def server(encoder: ClipEncoder) -> Iterator[Running]:
    """One server of one model."""
    with running(create_app([encoder], Settings(**PATIENT))) as server:
        yield server


@pytest.fixture
def serve() -> Callable[..., Any]:
    """running(app) for servers of one test."""
    return running


@pytest.fixture(scope="session")
def single(encoder: ClipEncoder) -> Callable[[bytes], NDArray[np.float32]]:
    """The embedding of one image by one call of the model, without a server."""

    def embed(data: bytes) -> NDArray[np.float32]:
        image = encoder.preprocess(data)
        with torch.inference_mode():
            model: Any = encoder._model
            row: NDArray[np.float32] = model.encode_image(image[None], normalize=True)[0].numpy()
        return row

    return embed


def write_photos(folder: Path, files: dict[str, bytes]) -> None:
    """The photos as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
