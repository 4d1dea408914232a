"""Executors: the same results from either, and a way of an image that goes down alone."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

import lraee
from lraee.towers.cuda_graphs import Graphs
from lraee.towers.executor import EagerExecutor, GraphExecutor
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import assert_same
from tests.test_rooms import FLOOR_OF


class FakeGraphs:
    """Runs each function as it stands, and keeps the name it came under."""

    def __init__(self) -> None:
        self.names: list[object] = []

    def run(self, name: object, function: Any, z: Tensor) -> tuple[Tensor, ...]:
        self.names.append(name)
        return cast(tuple[Tensor, ...], function(z))


@torch.no_grad()
def test_both_executors_run_the_segments_of_the_tower() -> None:
    model = make_model()
    tower = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2))).visual
    graphs, images = FakeGraphs(), make_images(3)
    eager, captured = EagerExecutor(tower), GraphExecutor(tower, cast(Graphs, graphs), 20.0)
    assert not eager.is_static and captured.is_static
    segments = tower.segments
    for segment in (segments.whole, segments.to_exits[0]):
        pairs = zip(eager.run(segment, images), captured.run(segment, images), strict=True)
        for part, other in pairs:
            assert_same(part, other)
    # A graph holds its numbers: another logit scale is another graph
    assert graphs.names == [("whole", 20.0), ("exit 0", 20.0)]


def room_of(frame: FrameType | None) -> str | None:
    """The room of lraee that a frame runs in, or None."""
    parts = Path(frame.f_code.co_filename).parts if frame else ()
    if "lraee" not in parts:
        return None
    room = parts[len(parts) - parts[::-1].index("lraee")]
    return room if room in FLOOR_OF else None


def test_no_call_on_the_way_of_an_image_climbs() -> None:
    """The runner calls segments, blocks, probes and router; none of them calls back."""
    model = make_model()
    fast = lraee.accelerate(model, exits=make_exits(model, kind="learned"))
    calls: set[tuple[str, str]] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        callee, caller = room_of(frame), frame.f_back
        while caller and room_of(caller) is None:
            caller = caller.f_back
        if event == "call" and callee and (calling := room_of(caller)):
            calls.add((calling, callee))

    with torch.no_grad():
        fast.encode_image(make_images(9))
        sys.setprofile(profile)
        try:
            fast.encode_image(make_images(9))
        finally:
            sys.setprofile(None)
    assert {("towers", "exits"), ("towers", "layers"), ("exits", "ops")} <= calls
    assert not {(a, b) for a, b in calls if FLOOR_OF[b] > FLOOR_OF[a]}
