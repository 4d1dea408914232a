"""What may come in: bounded bytes, and bounded seconds of work."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from lraee.serving.errors import ServiceError
from lraee.serving.settings import Settings


class Admission:
    """Counts bytes and seconds of all requests that are not answered; used by the event loop alone.

    One request is always admitted when there is no other, whatever it costs.
    """

    def __init__(self, settings: Settings) -> None:
        """See the class."""
        self._settings = settings
        self.body_bytes = 0
        self.work_s = 0.0
        self._requests = 0

    @contextmanager
    def body(self, size_bytes: int) -> Iterator[None]:
        """Reserve memory for one body; raises 429 beyond inflight_bytes."""
        if self.body_bytes and self.body_bytes + size_bytes > self._settings.inflight_bytes:
            raise ServiceError(429, "too many bytes are on their way", "overloaded", 1.0)
        self.body_bytes += size_bytes
        try:
            yield
        finally:
            self.body_bytes -= size_bytes

    @contextmanager
    def work(self, seconds: float, *, inputs: int = 1) -> Iterator[None]:
        """Reserve time of the model; raises 429 with the time to wait beyond queue_s.

        Several inputs that cannot be done within deadline_s get 413.
        """
        if inputs > 1 and seconds > self._settings.deadline_s:
            raise ServiceError(
                413, f"these inputs take about {seconds:.0f} s; send fewer at a time", "too_large"
            )
        over_s = self.work_s + seconds - self._settings.queue_s
        if self._requests and over_s > 0:
            raise ServiceError(
                429, f"{self.work_s:.1f} s of work wait already", "overloaded", math.ceil(over_s)
            )
        self.work_s += seconds
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            # Sums of floats leave a rest.
            self.work_s = max(0.0, self.work_s - seconds) if self._requests else 0.0
