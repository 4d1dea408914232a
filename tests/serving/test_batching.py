import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from lraee.serving.batching import Batcher, Result
from lraee.serving.errors import ServiceError
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings
from tests.serving.held_encoder import FakeEncoder

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def make(encoder: FakeEncoder, **options: Any) -> Batcher:
    batcher = Batcher("fake", encoder, Settings(**options), Metrics())
    batcher.start()
    return batcher


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


async def hold(batcher: Batcher, encoder: FakeEncoder) -> asyncio.Future[Result]:
    """Make the worker busy with one input until the gate opens."""
    encoder.gate.clear()
    encoder.started.clear()
    future = batcher.submit("image", 0)
    await asyncio.to_thread(encoder.started.wait, 10)
    return future


def test_waiting_inputs_become_one_batch_in_order() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder)
        first = await hold(batcher, encoder)
        futures = [batcher.submit("image", i) for i in range(1, 6)]
        assert batcher.depth == 5
        encoder.gate.set()
        rows = await asyncio.gather(first, *futures)
        assert encoder.batches == [[0], [1, 2, 3, 4, 5]]
        assert [row.embedding[0] for row in rows] == [0, 1, 2, 3, 4, 5]
        batcher.close()

    run(scene())


def test_batches_are_bounded_and_kinds_take_turns() -> None:
    async def scene() -> None:
        encoder = FakeEncoder(text_limit=1)
        batcher = make(encoder, max_batch=3)
        first = await hold(batcher, encoder)
        inputs = [("image", 1), ("text", 2), ("image", 3), ("text", 4), ("image", 5), ("image", 6)]
        futures = [batcher.submit(kind, i) for kind, i in inputs]  # type: ignore[arg-type]
        encoder.gate.set()
        await asyncio.gather(first, *futures)
        assert encoder.batches == [[0], [2], [1, 3, 5], [4], [6]]
        batcher.close()

    run(scene())


def test_a_call_waits_for_images_on_their_way_and_no_longer_than_its_deadline() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder, max_wait_s=5.0)
        batcher.arrive()
        batcher.arrive()
        first = batcher.submit("image", 1)
        batcher.depart()
        await asyncio.sleep(0.05)
        assert encoder.batches == []
        second = batcher.submit("image", 2)
        batcher.depart()
        await asyncio.gather(first, second)
        assert encoder.batches == [[1, 2]]
        batcher.close()

        encoder = FakeEncoder()
        batcher = make(encoder, max_wait_s=0.01)
        batcher.arrive()
        await batcher.submit("image", 3)
        assert encoder.batches == [[3]]
        batcher.close()

    run(scene())


def test_an_input_that_fails_harms_itself_only() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder)
        first = await hold(batcher, encoder)
        futures = [batcher.submit("image", each) for each in (1, "bad", "nan", 4)]
        encoder.gate.set()
        await first
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [getattr(r, "status", 200) for r in results] == [200, 500, 422, 200]
        assert "secret" not in str(results[1])
        assert isinstance(results[3], Result) and results[3].embedding[0] == 4
        assert batcher.is_alive
        batcher.close()

    run(scene())


def test_cancelled_inputs_leave_the_queue() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder)
        first = await hold(batcher, encoder)
        futures = [batcher.submit("image", i) for i in range(1, 4)]
        futures[1].cancel()
        encoder.gate.set()
        await asyncio.gather(first, futures[0], futures[2])
        assert encoder.batches == [[0], [1, 3]]
        batcher.close()

    run(scene())


def test_inputs_past_their_deadline_get_504() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder, deadline_s=0.05)
        first = await hold(batcher, encoder)
        late = batcher.submit("image", 1)
        await asyncio.sleep(0.1)
        encoder.gate.set()
        await first
        with pytest.raises(ServiceError) as caught:
            await late
        assert caught.value.status == 504 and encoder.batches == [[0]]
        batcher.close()

    run(scene())


def test_a_dead_worker_answers_all_and_takes_no_more() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder, max_batch=1)
        assert batcher.is_alive
        first = await hold(batcher, encoder)
        dying = batcher.submit("image", "die")
        waiting = batcher.submit("image", 1)
        encoder.gate.set()
        await first
        for future in (dying, waiting):
            with pytest.raises(ServiceError) as caught:
                await future
            assert caught.value.status == 503
        batcher._thread.join(5)
        assert not batcher.is_alive
        with pytest.raises(ServiceError):
            batcher.submit("image", 2)

    run(scene())


def test_a_call_that_never_ends_is_seen() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder, stall_s=0.05)
        first = await hold(batcher, encoder)
        await asyncio.sleep(0.1)
        assert not batcher.is_alive
        encoder.gate.set()
        await first
        assert batcher.is_alive
        batcher.close()

    run(scene())


def test_close_finishes_what_waits() -> None:
    async def scene() -> None:
        encoder = FakeEncoder()
        batcher = make(encoder, max_batch=2)
        first = await hold(batcher, encoder)
        futures = [batcher.submit("image", i) for i in range(1, 6)]
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        with pytest.raises(ServiceError):
            batcher.submit("image", 9)
        encoder.gate.set()
        rows = await asyncio.gather(first, *futures)
        assert [row.embedding[0] for row in rows] == [0, 1, 2, 3, 4, 5]
        await closing
        assert not batcher.is_alive

    run(scene())


def test_times_are_learned_and_forgotten() -> None:
    async def scene() -> None:
        encoder = FakeEncoder(seconds=0.02)
        batcher = make(encoder)
        assert batcher.seconds("image") == 0
        await batcher.submit("image", 1)
        await asyncio.sleep(0.01)
        assert batcher.seconds("image") >= 0.02 and batcher.seconds("text") == 0
        batcher.forget_seconds()
        assert batcher.seconds("image") == 0
        batcher.close()

    run(scene())
