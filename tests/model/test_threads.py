"""One accelerated model, many threads: every call gives the same bits."""

from concurrent.futures import ThreadPoolExecutor

import torch

import lraee
from tests.clip_models import make_lraee_tiny
from tests.support import assert_same, generator

THREADS, CALLS = 16, 50


def test_sixteen_threads_share_one_model():
    fast = lraee.accelerate(make_lraee_tiny())
    images = torch.randn(4, 3, 56, 56, generator=generator(0))
    with torch.no_grad():
        expected = fast.encode_image(images)

    def serve(thread: int) -> None:
        with torch.no_grad():
            for call in range(CALLS):
                first = (thread + call) % 4
                result = fast.encode_image(images[first:])
                assert_same(result, expected[first:], thread=thread, call=call)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(serve, thread) for thread in range(THREADS)]:
            done.result()
