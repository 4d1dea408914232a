"""Segments: which blocks lie in which, and that the segments of a tower are built once."""

import copy
import pickle

import pytest
import torch

import lraee
from lraee.exits.head import Int8Head
from lraee.towers import runner as vision
from lraee.towers.executor import EagerExecutor
from lraee.towers.segments import Segments
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import assert_same


@pytest.mark.parametrize("exits", [(), (1,), (2, 3), (1, 2, 3)])
def test_every_block_is_in_one_segment(exits: tuple[int, ...]) -> None:
    segments = Segments.of(4, exits)
    path = [*segments.to_exits, segments.end, segments.finish]
    blocks = [block for each in path for block in range(each.first, each.last)]
    assert blocks == [0, 1, 2, 3]
    assert [each.embeds for each in path] == [True] + [False] * (len(path) - 1)
    assert [each.finishes for each in path] == [False] * (len(path) - 1) + [True]
    assert [each.exit for each in segments.to_exits] == list(range(len(exits)))
    assert tuple(each.last for each in segments.to_exits) == exits
    whole = segments.whole
    assert (whole.first, whole.last, whole.embeds, whole.finishes) == (0, 4, True, True)
    assert len({each.name for each in (whole, *path)}) == len(path) + 1


@torch.no_grad()
def test_built_once_with_the_exits() -> None:
    model = make_model()
    fast = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 2)))
    tower = fast.visual
    before = tower.segments
    assert before == Segments.of(3, (1, 2))
    fast.encode_image(make_images(3))
    fast.set_classes(torch.eye(3, 24))
    fast.eval().half().float()
    assert tower.segments is before
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert other.segments == before
    vision.detach_exits(tower)
    assert tower.segments == Segments.of(3)
    assert not hasattr(lraee.restore(fast, model).visual, "segments")


@torch.no_grad()
def test_a_segment_to_an_exit_ends_with_its_probe() -> None:
    model = make_model()
    tower = lraee.accelerate(model, exits=make_exits(model, blocks=(2,))).visual
    executor, images = EagerExecutor(tower), make_images(5)
    z, *probe = executor.run(tower.segments.to_exits[0], images)
    assert_same(z, tower.run_blocks(tower.embed(images), 0, 2))
    head = tower.exits.heads[0]
    assert isinstance(head, Int8Head)
    for part, expected in zip(
        probe, head(z, tower.exits.contrasts, tower.exits.logit_scale), strict=True
    ):
        assert_same(part, expected)
    (z,) = executor.run(tower.segments.end, z)
    with lraee.full_depth(tower):
        assert_same(executor.run(tower.segments.finish, z)[0], tower(images))
