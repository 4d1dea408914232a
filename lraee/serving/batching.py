"""The batcher: single inputs of many clients become calls of one model, in one thread."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lraee.serving.errors import ServiceError
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings

Kind = Literal["image", "text", "class"]
_log = logging.getLogger("lraee.serving")


@dataclass(frozen=True)
class Result:
    """A unit embedding float32 [E].

    Args:
      embedding: see above.
      exit_block: after how many blocks the image left a tower with exits, else None.
      tokens: of a text, without padding; 0 of an image.
    """

    embedding: NDArray[np.float32]
    exit_block: int | None = None
    tokens: int = 0


class Encoder(Protocol):
    """What the batcher runs. An input's result must not depend on the batch that it is in."""

    def batch_limit(self, kind: Kind) -> int:
        """Most inputs of one call."""

    def encode(self, kind: Kind, payloads: Sequence[Any]) -> list[Result]:
        """One result for each payload."""


@dataclass(eq=False)
class _Job:
    kind: Kind
    payload: Any
    future: asyncio.Future[Result]
    deadline: float
    enqueued: float = field(default_factory=time.monotonic)


class Batcher:
    """One model's queue and worker thread.

    A call starts when the worker is free and a batch is full, or nothing else is being decoded for
    it, or its oldest input has waited `settings.max_wait_s`. Kinds alternate, so that a thousand
    class names do not hold up an image. Inputs of cancelled clients and those
    past their deadline leave the queue. An input on which the model fails harms itself only: its
    batch is run again one by one. If the worker dies, all inputs get 503 and `is_alive` is False.

    Args:
      name: of the model, for metrics and the log.
      encoder: see Encoder; called by the worker thread alone.
      settings: max_batch, max_wait_s, deadline_s, stall_s.
      metrics: where queue depth, batch sizes, times and exits are counted.
    """

    def __init__(self, name: str, encoder: Encoder, settings: Settings, metrics: Metrics) -> None:
        """See the class; the thread starts with `start`."""
        self._name, self._encoder, self._settings = name, encoder, settings
        self._metrics = metrics.of_model(name)
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._arriving = 0
        self._is_closed = False
        self._busy_since: float | None = None
        self._seconds: dict[Kind, float] = {}
        self._last_kind: Kind | None = None
        self._thread = threading.Thread(target=self._work, name=f"lraee-{name}", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs, and is not in one call for longer than stall_s."""
        since = self._busy_since
        is_stalled = since is not None and time.monotonic() - since > self._settings.stall_s
        return self._thread.is_alive() and not is_stalled

    @property
    def depth(self) -> int:
        """Inputs that wait."""
        return len(self._queue)

    def seconds(self, kind: Kind) -> float:
        """Time that one input takes in the model, as of late; 0 before the first."""
        return self._seconds.get(kind, 0.0)

    def forget_seconds(self) -> None:
        """Times so far were those of cold caches."""
        self._seconds.clear()

    def arrive(self) -> None:
        """An image is on its way: a call may wait for it, until `depart`."""
        self._arriving += 1

    def depart(self) -> None:
        """The image came into the queue, or never will."""
        with self._changed:
            self._arriving -= 1
            if not self._arriving:
                self._changed.notify()

    def submit(self, kind: Kind, payload: Any) -> asyncio.Future[Result]:
        """Put one input into the queue of the running event loop; cancel the future to leave it.

        The future raises ServiceError: 503 without a worker, 504 past the deadline, 500 where the
        model failed on this input.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = _Job(kind, payload, future, time.monotonic() + self._settings.deadline_s)
        with self._changed:
            if self._is_closed or not self._thread.is_alive():
                raise _unavailable()
            self._queue.append(job)
            self._changed.notify()
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish what is in the queue, then end the worker."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # The worker thread

    def _work(self) -> None:
        try:
            while (jobs := self._next_batch()) is not None:
                if jobs:
                    self._run(jobs)
        except BaseException:
            _log.exception("worker of %s died", self._name)
        finally:
            with self._changed:
                self._is_closed = True
                left, self._queue = list(self._queue), deque()
            _answer([(job, _unavailable()) for job in left])

    def _next_batch(self) -> list[_Job] | None:
        """The oldest inputs of one kind; [] if all of them have left; None at the end."""
        with self._changed:
            while not self._queue:
                if self._is_closed:
                    return None
                self._changed.wait()
            others = (job for job in self._queue if job.kind != self._last_kind)
            first = next(others, self._queue[0])
            kind = self._last_kind = first.kind
            limit = min(self._encoder.batch_limit(kind), self._settings.max_batch)
            latest = first.enqueued + self._settings.max_wait_s
            while self._arriving and kind == "image" and not self._is_closed:
                left_s = latest - time.monotonic()
                if left_s <= 0 or sum(job.kind == kind for job in self._queue) >= limit:
                    break
                self._changed.wait(left_s)
            return self._take(kind, limit)

    def _take(self, kind: Kind, limit: int) -> list[_Job]:
        now = time.monotonic()
        taken: list[_Job] = []
        expired: list[_Job] = []
        rest: deque[_Job] = deque()
        while self._queue and len(taken) < limit:
            job = self._queue.popleft()
            if job.future.cancelled():
                self._metrics.cancelled.inc()
            elif job.deadline < now:
                expired.append(job)
            elif job.kind == kind:
                taken.append(job)
            else:
                rest.append(job)
        self._queue.extendleft(reversed(rest))
        if expired:
            late = ServiceError(504, "the deadline passed before the model was free", "deadline")
            self._metrics.expired.inc(len(expired))
            _answer([(job, late) for job in expired])
        return taken

    def _run(self, jobs: list[_Job]) -> None:
        """Answer every job, also where the thread is dying."""
        answers: list[tuple[_Job, Result | ServiceError]] = []
        started = self._busy_since = time.monotonic()
        for job in jobs:
            self._metrics.wait_seconds.observe(started - job.enqueued)
        try:
            answers = list(zip(jobs, self._encode(jobs), strict=True))
            self._count(jobs[0].kind, time.monotonic() - started, answers)
        finally:
            self._busy_since = None
            _answer(answers or [(job, _unavailable()) for job in jobs])

    def _encode(self, jobs: list[_Job]) -> Sequence[Result | ServiceError]:
        try:
            with self._metrics.cpu.working():
                results = self._encoder.encode(jobs[0].kind, [job.payload for job in jobs])
            return [_checked(result) for result in results]
        except Exception:
            _log.exception("%s failed on %d inputs", self._name, len(jobs))
            if len(jobs) == 1:
                return [ServiceError(500, "the model failed on this input", "model_failed")]
            return [answer for job in jobs for answer in self._encode([job])]

    def _count(
        self, kind: Kind, elapsed_s: float, answers: list[tuple[_Job, Result | ServiceError]]
    ) -> None:
        each = elapsed_s / len(answers)
        self._seconds[kind] = 0.8 * self._seconds.get(kind, each) + 0.2 * each
        self._metrics.batch(kind, len(answers), elapsed_s)
        for _, result in answers:
            if isinstance(result, Result) and result.exit_block is not None:
                self._metrics.exit(result.exit_block)


def _checked(result: Result) -> Result | ServiceError:
    if np.isfinite(result.embedding).all():
        return result
    return ServiceError(422, "the embedding of this input is not finite", "not_finite")


def _unavailable() -> ServiceError:
    return ServiceError(503, "the model does not run", "unavailable", retry_after_s=10)


def _answer(answers: Sequence[tuple[_Job, Result | ServiceError]]) -> None:
    """Give results to the event loops that wait for them, with one wake-up for each loop."""
    loops = {job.future.get_loop() for job, _ in answers}
    for loop in loops:
        own = [(job.future, result) for job, result in answers if job.future.get_loop() is loop]
        try:
            loop.call_soon_threadsafe(_set_all, own)
        except RuntimeError:  # that loop is closed, and no request waits
            continue


def _set_all(answers: list[tuple[asyncio.Future[Result], Result | ServiceError]]) -> None:
    for future, result in answers:
        if future.done():
            continue
        if isinstance(result, ServiceError):
            future.set_exception(result)
        else:
            future.set_result(result)
