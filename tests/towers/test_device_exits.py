"""A whole tower with exits as one function: the embeddings, depths and scores of the eager router.

Kernels run in Triton's interpreter, graphs by the stand-in of test_cuda_graphs.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.exits import gate as gates
from lraee.exits.class_token import ClassTokenWeights
from lraee.exits.gate import GateKind
from lraee.exits.router import Compaction
from lraee.kernels import live_rows
from lraee.ops.reference.rows import square_root
from lraee.towers import cuda_graphs, device_exits
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.kernels import places
from tests.support import assert_same
from tests.towers.graph_stand_in import StandIn

GATES: tuple[GateKind, ...] = ("learned", "confidence", "patience", "agreement", "static")
BATCHES = (1, 3, 5, 4, 16, 2, 5)
Work = Callable[[], None]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's square root is exact on CUDA, and one unit off in places on the CPU."""

    def unit(embedding: Tensor) -> Tensor:
        length = square_root(gates.lane_sum(embedding * embedding)).clamp(min=1e-12)
        return embedding / length[:, None]

    monkeypatch.setattr(gates, "unit", unit)
    with torch.no_grad():
        yield


@pytest.fixture(params=["before", "beside", "beside, late"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A probe runs before the next block; beside it, at once; or as late as it may."""
    rows = 0 if request.param == "before" else 10**9
    monkeypatch.setattr(device_exits, "MOST_ROWS_BESIDE", rows)
    if request.param == "beside, late":
        monkeypatch.setattr(cuda_graphs.Graphs, "beside", lambda held, work: _late(work))
    return str(request.param)


def _late(work: Work) -> Work:
    live = live_rows.current()
    assert live is not None

    def join() -> None:
        with live_rows.using(live):
            work()

    return join


def small() -> nn.Module:
    return make_model(vision={"layers": 4, "patch_size": 16})


def compare(fast: Any, images: Tensor) -> list[int]:
    """The same embeddings, depths and scores with graphs and without; the depths."""
    fast.encode_image(images)  # the first call of a bucket is the router's
    with lraee.trace(fast) as there:
        result = fast.encode_image(images)
    fast.visual.cuda_graphs = False
    with lraee.trace(fast) as here:
        expected = fast.encode_image(images)
    del fast.visual.cuda_graphs
    assert_same(result, expected, B=len(images))
    assert_same(there.exit_block, here.exit_block, B=len(images))
    assert_same(there.scores, here.scores, B=len(images))
    assert_same(there.features, here.features, B=len(images))
    return [int(depth) for depth in here.exit_block]


@pytest.mark.parametrize("kind", GATES)
def test_every_gate(stand_in: StandIn, order: str, kind: GateKind) -> None:
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2, 3), kind=kind))
    depths, replays = set(), stand_in.replays
    for seed, B in enumerate(BATCHES):
        torch.manual_seed(seed)
        images = make_images(B)
        images[B // 2 :: 5] *= math.nan
        depths.update(compare(fast, images))
    assert stand_in.replays == replays + 2 * len(BATCHES)
    assert len(depths) > (kind != "static"), depths


def test_none_some_and_all_at_each_exit(stand_in: StandIn, order: str) -> None:
    """Padding rows (5 of 6), and an exit right before the last block, which gives one token."""
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2, 3)))
    router, images = fast.visual.exits, make_images(5)
    some = router.gate.thresholds
    depths, captures = set(), stand_in.captures
    for e in range(3):
        for threshold in (math.inf, some[e], -math.inf):
            thresholds = [some[i] if i < e else math.inf for i in range(3)]
            thresholds[e] = threshold
            router.gate = replace(router.gate, thresholds=tuple(thresholds))
            depths.update(compare(fast, images))
    assert depths == {1, 2, 3, 4}
    assert stand_in.captures == captures + 1


@pytest.mark.parametrize("has_probe", [True, False])
def test_static_exits(stand_in: StandIn, order: str, has_probe: bool) -> None:
    """Open, no block is run behind it; closed, it is run through. Exits for search too."""
    model = small()
    exits = make_exits(model, kind="static", blocks=(2,))
    if not has_probe:
        w, b = torch.randn(1, 128, 64) / 8, torch.randn(1, 128)
        exits = replace(exits, heads={2: ClassTokenWeights(w, b, model.visual.output_dim)})
    fast: Any = lraee.accelerate(model, exits=exits)
    gate, images = fast.visual.exits.gate, make_images(5)
    for threshold, depth in ((-math.inf, 2), (math.inf, 4), (0.0, 2)):
        fast.visual.exits.gate = replace(gate, thresholds=(threshold,))
        assert compare(fast, images) == [depth] * 5
        assert all(cuda_graphs._all[fast.visual].checks.values())
    with lraee.trace(fast) as t:
        fast.encode_image(images)
    assert t.stats.run_flops == t.stats.expected_flops


def test_flops_that_were_run(stand_in: StandIn, order: str) -> None:
    """As by the eager router that always compacts; beside a probe one block more is run."""
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 3)))
    fast.visual.exits.compaction = Compaction(0.0)
    images = make_images(16)
    stats = []
    for has_graphs in (True, False):
        fast.visual.cuda_graphs = has_graphs
        fast.encode_image(images)
        with lraee.trace(fast) as t:
            fast.encode_image(images)
        stats.append(t.stats)
    assert stats[0].expected_flops == stats[1].expected_flops == stats[1].run_flops
    assert (stats[0].run_flops == stats[1].run_flops) == (order == "before")
    assert stats[0].run_flops >= stats[1].run_flops and len(set(t.exit_block.tolist())) > 1


def test_hooks_and_refusals_leave_it_to_the_router(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 3)))
    images, calls = make_images(5), []
    run = device_exits.DeviceExits.run
    monkeypatch.setattr(
        device_exits.DeviceExits, "run", lambda *given: calls.append(1) or run(*given)
    )
    handle = fast.visual.transformer.resblocks[3].register_forward_hook(lambda *_: None)
    compare(fast, images)
    handle.remove()
    assert not calls
    compare(fast, images)
    assert calls

    def refuse(*_: object) -> None:
        raise cuda_graphs.CaptureError("no")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    cuda_graphs.drop(fast.visual)
    calls.clear()
    for _ in range(2):  # the first call runs what could not be captured
        compare(fast, images)
    assert len(calls) == 1


def test_the_first_call_is_checked(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, and the router's bits from then on; a trace sees each call once."""
    model = small()
    fast: Any = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 3)))
    images = make_images(4)
    fast.visual.cuda_graphs = False
    expected = fast.encode_image(images)
    del fast.visual.cuda_graphs
    merge = device_exits.DeviceRouting.merge

    def wrong(routing: Any, y: Tensor) -> Any:
        result, *rest = merge(routing, y)
        return result.add_(1.0), *rest

    monkeypatch.setattr(device_exits.DeviceRouting, "merge", wrong)
    with caplog.at_level(logging.WARNING, "lraee"), lraee.trace(fast) as t:
        for _ in range(3):
            assert_same(fast.encode_image(images), expected)
    assert len(t.exit_block) == 3 * 4
    assert caplog.messages == [
        "accelerate: exits must have the router's bits on the device, got others at batch 4"
        " (learned gate): they are decided on the host, calls are slower; please report it"
    ]


@pytest.mark.parametrize(
    ("kind", "rows", "B"),
    [
        ("learned", 0, 3),
        pytest.param("learned", 10**9, 5, marks=pytest.mark.slow),
        pytest.param("agreement", 0, 5, marks=pytest.mark.slow),
        pytest.param("patience", 10**9, 5, marks=pytest.mark.slow),
    ],
)
def test_all_kernels_in_the_interpreter(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, kind: GateKind, rows: int, B: int
) -> None:
    """Blocks and probes too, which skip rows of images that exited; five images fill a bucket of
    six.
    """
    blocks = (1,) if B == 3 else (1, 2)
    size = {"layers": len(blocks) + 1, "patch_size": 16, "width": 32}
    model = make_model(vision=size)
    exits = make_exits(model, blocks=blocks, kind=kind)
    images = make_images(B)
    images[1] = math.nan
    monkeypatch.setattr(device_exits, "MOST_ROWS_BESIDE", rows)
    with places.at("interpreter") as place:
        fast = place.accelerate(model, exits)
        fast.encode_image(images)  # compared with the router's
        assert list(cuda_graphs._all[fast.visual].checks.values()) == [True]
        result = fast.encode_image(images)
        fast.visual.cuda_graphs = False
        with lraee.trace(fast) as t:
            assert_same(result, fast.encode_image(images))
    assert len(set(t.exit_block.tolist())) > 1
