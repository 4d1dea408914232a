"""Threads that work ahead of one consumer, which gets the results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ordered(
    items: Iterable[A], work: Callable[[A], B], *, workers: int, window: int
) -> Iterator[B]:
    """work(item) of each item in order, computed by `workers` threads, at most `window` ahead.

    The items are drawn by the consumer's thread. What `work` raises is raised at its turn; then,
    or where the consumer stops, what has not begun is dropped.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="lraee-decode") as pool:
        pending: deque[Future[B]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
