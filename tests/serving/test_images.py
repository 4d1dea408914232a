"""The decoder's threads; what it refuses is tested through the server."""

import pytest

from lraee.serving import images
from lraee.serving.images import Decoder
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings


@pytest.mark.parametrize(
    ("available", "cpus", "threads"),
    [(1, None, 1), (3, None, 3), (8, 2.0, 2), (8, 0.5, 1)],
)
def test_threads_follow_the_quota_or_the_setting(
    monkeypatch: pytest.MonkeyPatch, available: int, cpus: float | None, threads: int
) -> None:
    monkeypatch.setattr(images, "threads_here", lambda: available)
    decoder = Decoder(Settings(cpus=cpus), Metrics())
    assert decoder.threads == threads
    decoder.close()
