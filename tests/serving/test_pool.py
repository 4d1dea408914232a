import threading
from collections.abc import Iterator

import pytest

from lraee.serving.pool import ordered


def test_results_come_in_order_and_items_are_drawn_as_they_are_needed() -> None:
    drawn = 0
    gates = [threading.Event() for _ in range(40)]

    def items() -> Iterator[int]:
        nonlocal drawn
        for i in range(40):
            drawn += 1
            yield i

    def work(i: int) -> int:
        # The first of each pair waits for the second
        if i % 2 == 0:
            assert gates[i + 1].wait(20)
        gates[i].set()
        return i

    for k, result in enumerate(ordered(items(), work, workers=2, window=6)):
        assert result == k
        assert drawn <= k + 6


def test_an_error_comes_at_its_turn_and_the_rest_is_dropped() -> None:
    ran: list[int] = []

    def work(i: int) -> int:
        ran.append(i)
        if i == 5:
            raise KeyError(i)
        return i

    results = []
    with pytest.raises(KeyError):
        for result in ordered(range(1000), work, workers=1, window=8):
            results.append(result)
    assert results == [0, 1, 2, 3, 4]
    assert len(ran) <= 5 + 8


def test_a_consumer_that_stops_ends_the_threads() -> None:
    before = threading.active_count()
    results = ordered(range(1000), lambda i: i, workers=3, window=8)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
