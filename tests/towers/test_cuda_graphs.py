"""Graphs of a tower: replayed here by a stand-in that is as careless with its memory as CUDA is.

On a GPU the same is asked of real graphs (tests marked gpu).
"""

import copy
import logging
import math
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.towers import cuda_graphs as graphs
from lraee.towers.cuda_graphs import Captured, CaptureError, Function
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import assert_same
from tests.towers.graph_stand_in import StandIn

BATCHES = (1, 3, 5, 4, 16, 2, 5)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def small() -> nn.Module:
    return make_model(vision={"layers": 4, "patch_size": 16})


def with_and_without(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    result = model.encode_image(images)
    model.visual.cuda_graphs = False
    expected = model.encode_image(images)
    del model.visual.cuda_graphs
    return result, expected


def test_a_tower_of_any_batch(stand_in: StandIn) -> None:
    fast: Any = lraee.accelerate(small())
    kept = []
    for B in BATCHES:
        kept.append(with_and_without(fast, make_images(B)))
    for result, expected in kept:  # after all calls: no result was overwritten
        assert_same(result, expected)
    assert stand_in.captures == 6 and stand_in.replays == len(BATCHES)  # 5 and 6 share a bucket


def test_one_graph_for_a_tower_with_exits(stand_in: StandIn) -> None:
    """Thresholds lie in memory that the graph reads: others are no other graph."""
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 3)))
    segments = fast.visual.segments
    gate, images, captures = fast.visual.exits.gate, make_images(4), stand_in.captures
    for thresholds in ((-9.0, 9.0), (9.0, -9.0), (9.0, 9.0)):
        fast.visual.exits.gate = replace(gate, thresholds=thresholds)
        fast.encode_image(images)  # the first call is checked
        before = stand_in.replays
        assert_same(*with_and_without(fast, images), thresholds=thresholds)
        assert (stand_in.captures, stand_in.replays) == (captures + 1, before + 1)
    assert fast.visual.segments is segments
    with lraee.full_depth(fast):
        assert_same(*with_and_without(fast, images))
    assert stand_in.captures == captures + 2


def test_padding_rows_change_nothing(stand_in: StandIn) -> None:
    fast: Any = lraee.accelerate(small())
    images = make_images(6)
    expected = fast.encode_image(images[:5])
    fast.encode_image(torch.full_like(images, torch.nan))
    assert_same(fast.encode_image(images[:5]), expected)


def test_numbers_that_change_are_seen(stand_in: StandIn) -> None:
    fast: Any = lraee.accelerate(small())
    images = make_images(3)
    before = fast.encode_image(images)
    other = lraee.accelerate(small())  # random weights of its own
    fast.load_state_dict(other.state_dict())
    result, expected = with_and_without(fast, images)
    assert_same(result, expected)
    assert not torch.equal(result, before)
    fast.visual.ln_post.weight = nn.Parameter(fast.visual.ln_post.weight * 2)
    assert_same(*with_and_without(fast, images))
    fast.visual.ln_post = nn.LayerNorm(fast.visual.ln_post.normalized_shape)
    assert_same(*with_and_without(fast, images))
    fast.bfloat16()
    assert_same(*with_and_without(fast, images.bfloat16()))


def test_classes_that_change_are_seen(stand_in: StandIn) -> None:
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2)))
    images = make_images(8)
    assert_same(*with_and_without(fast, images))
    for K in (2, 9):
        fast.set_classes(torch.randn(K, model.visual.output_dim))
        assert_same(*with_and_without(fast, images))


def test_hooks_see_every_call(stand_in: StandIn) -> None:
    fast: Any = lraee.accelerate(small())
    images, recorded = make_images(2), []
    expected = fast.encode_image(images)
    handle = fast.visual.transformer.resblocks[2].register_forward_hook(
        lambda module, given, y: recorded.append(y.shape)
    )
    replays = stand_in.replays
    for calls in (1, 2):
        assert_same(fast.encode_image(images), expected)
        assert len(recorded) == calls
    handle.remove()
    assert_same(fast.encode_image(images), expected)
    assert len(recorded) == 2 and stand_in.replays == replays + 1


def test_a_failed_capture_is_logged_once(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Function, padded: Tensor, pool: Any) -> tuple[Captured, Any]:
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    fast: Any = lraee.accelerate(small())
    images = make_images(2)
    with caplog.at_level(logging.WARNING, "lraee"):
        for _ in range(2):
            assert_same(*with_and_without(fast, images))
    assert [r.message for r in caplog.records] == [
        "accelerate: no CUDA graphs for this tower, calls are slower:"
        " operation not permitted when stream is capturing"
    ]


def test_threads_wait_for_each_other(stand_in: StandIn) -> None:
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2)))
    images = [make_images(B) for B in (1, 3, 8)]
    expected = [with_and_without(fast, part)[1] for part in images]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.no_grad():
            for i in range(6):
                part = (which + i) % len(images)
                if not torch.equal(fast.encode_image(images[part]), expected[part]):
                    wrong.append(part)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_make_graphs_of_their_own(stand_in: StandIn) -> None:
    fast: Any = lraee.accelerate(small())
    images = make_images(2)
    expected = fast.encode_image(images)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        captures = stand_in.captures
        assert_same(copied.encode_image(images), expected)
        assert stand_in.captures == captures + 1
    captures = stand_in.captures


def test_graphs_go_with_their_tower(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(function: Function, padded: Tensor, pool: Any) -> tuple[Captured, Any]:
        return Captured(
            lambda: None, padded, function(padded)
        ), pool  # as CUDA: numbers, no functions

    monkeypatch.setattr(graphs, "capture", capture)
    fast: Any = lraee.accelerate(small())
    fast.encode_image(make_images(1))
    count = len(graphs._all)
    graphs.drop(fast.visual)
    assert len(graphs._all) == count - 1
    fast.encode_image(make_images(1))
    del fast
    assert len(graphs._all) == count - 1


def test_a_constant_lies_in_one_place(stand_in: StandIn) -> None:
    """Graphs read it there: it is written where it changes, and nowhere else."""
    fast: Any = lraee.accelerate(small())
    with torch.inference_mode():
        held = graphs.of(fast.visual, torch.device("cpu"))
        first = held.constant("images", (3,), torch.int32)
        gate = held.constant("gate", (0.5, -math.inf), torch.float32)
    assert first.tolist() == [3] and gate.tolist() == [0.5, -math.inf]
    version = first._version
    assert held.constant("images", (3,), torch.int32) is first and first._version == version
    assert held.constant("images", (5,), torch.int32) is first and first.tolist() == [5]
    assert held.constant("gate", (1.0,), torch.float32) is not gate


def test_buckets() -> None:
    assert [graphs.bucket_of(B) for B in (1, 2, 5, 9, 33, 100, 128)] == [1, 2, 6, 12, 48, 128, 128]
    pairs = zip(graphs.BUCKETS, graphs.BUCKETS[1:], strict=False)
    assert all(b <= max(2 * a, a + 1) and (a < 2 or b <= 1.5 * a) for a, b in pairs)


# On a GPU


@pytest.fixture
def on_gpu() -> tuple[Any, Any]:
    """A model on the GPU, plain and with exits."""
    model = small()
    exits = make_exits(model, blocks=(1, 2, 3))
    model = model.to("cuda")
    return lraee.accelerate(model), lraee.accelerate(model, exits=exits)


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_on_a_gpu(on_gpu: tuple[Any, Any]) -> None:
    for fast in on_gpu:
        for seed, B in enumerate((*BATCHES, 128)):
            torch.manual_seed(seed)
            images = make_images(B).to("cuda")
            fast.encode_image(images)  # the first call of a tower with exits is checked
            assert_same(*(part.cpu() for part in with_and_without(fast, images)), B=B)
        assert graphs._all[fast.visual]._captured
        assert not graphs._all[fast.visual]._refusal
        assert all(graphs._all[fast.visual].checks.values())


@pytest.mark.gpu
def test_threads_and_streams_on_a_gpu(on_gpu: tuple[Any, Any]) -> None:
    _, fast = on_gpu
    images = [make_images(B).to("cuda") for B in (1, 3, 8)]
    expected = [with_and_without(fast, part)[1] for part in images]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                part = (which + i) % len(images)
                if not torch.equal(fast.encode_image(images[part]), expected[part]):
                    wrong.append(part)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@torch.inference_mode()
def test_numbers_that_change_are_seen_on_a_gpu(on_gpu: tuple[Any, Any]) -> None:
    fast, _ = on_gpu
    images = make_images(3).to("cuda")
    fast.encode_image(images)
    fast.load_state_dict(lraee.accelerate(small().to("cuda")).state_dict())
    assert_same(*(part.cpu() for part in with_and_without(fast, images)))
    fast.half()
    assert_same(*(part.cpu() for part in with_and_without(fast, images.half())))
