"""What a server counts, for Prometheus; one registry for each server."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)  # fmt: skip

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class CpuSplit:
    """CPU of threads that serve requests, split into their work and the rest.

    Args:
      work: counts seconds of CPU inside `working`.
      rest: counts what the same threads spent since their work before.
    """

    def __init__(self, work: Counter, rest: Counter) -> None:
        """See the class."""
        self._work, self._rest = work, rest
        self._until = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The work of this thread; threads that it starts are not counted."""
        started = time.thread_time()
        self._rest.inc(started - getattr(self._until, "seconds", 0.0))
        try:
            yield
        finally:
            self._until.seconds = time.thread_time()
            self._work.inc(self._until.seconds - started)


class ModelMetrics:
    """The counters of one model; the batcher's thread writes them."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        """See the class."""
        self._metrics, self._model = metrics, model
        self.cancelled = metrics.cancelled.labels(model)
        self.expired = metrics.expired.labels(model)
        self.wait_seconds = metrics.wait_seconds.labels(model)
        self.cpu = metrics.cpu_split("model")

    def batch(self, kind: str, size: int, elapsed_s: float) -> None:
        """One call of the model."""
        self._metrics.batch_size.labels(self._model, kind).observe(size)
        self._metrics.model_seconds.labels(self._model, kind).observe(elapsed_s)

    def exit(self, block: int) -> None:
        """One image left after so many blocks."""
        self._metrics.exits.labels(self._model, str(block)).inc()


class Metrics:
    """All series of one server, `lraee_…`; times in seconds."""

    def __init__(self) -> None:
        """See the class."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests.", "route", "status")
        self.request_seconds = self._histogram("request_seconds", "Whole requests.", "route")
        self.batch_size = Histogram(
            "lraee_batch_size", "Inputs of a call of the model.", ("model", "kind"),
            buckets=_SIZES, registry=self.registry,
        )  # fmt: skip
        self.model_seconds = self._histogram(
            "model_seconds", "Calls of the model.", "model", "kind"
        )
        self.wait_seconds = self._histogram("wait_seconds", "Inputs in the queue.", "model")
        self.decode_seconds = self._histogram("decode_seconds", "Bytes to a tensor, one image.")
        self.cancelled = self._counter("cancelled", "Inputs whose client had left.", "model")
        self.expired = self._counter("expired", "Inputs past their deadline.", "model")
        self.exits = self._counter(
            "exits", "Images by the block they left after.", "model", "block"
        )
        self._cpu_seconds = self._counter(
            "cpu_seconds",
            "CPU time: decode, model (its calling thread alone), and threads: what these threads "
            "spent beside that work.",
            "part",
        )
        self._depth = Gauge(
            "lraee_queue_depth", "Inputs that wait.", ("model",), registry=self.registry
        )
        loop = Gauge(
            "lraee_event_loop_cpu_seconds",
            "CPU time of the thread that speaks HTTP: without decoding and model.",
            registry=self.registry,
        )
        loop.set_function(time.thread_time)  # /metrics runs in that thread

    def cpu_split(self, part: str) -> CpuSplit:
        """Where the threads that do this part count their CPU."""
        return CpuSplit(self._cpu_seconds.labels(part), self._cpu_seconds.labels("threads"))

    def of_model(self, name: str) -> ModelMetrics:
        """The series of one model."""
        return ModelMetrics(self, name)

    def watch_depth(self, name: str, depth: Callable[[], float]) -> None:
        """Let the gauge of one model's queue ask `depth`."""
        self._depth.labels(name).set_function(depth)

    def render(self) -> bytes:
        """Prometheus' text format; to be called by the event loop's thread."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lraee_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"lraee_{name}", text, labels, buckets=_SECONDS, registry=self.registry)
