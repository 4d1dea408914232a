"""Exits, their plans and compaction: what fits together, and what a router is made of."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from lraee.exits.bundle import Exits, one_class
from lraee.exits.gate import CLASS_FREE, Gate, GateKind
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from tests.exits.random_exits import make_head
from tests.exits.small_exits import D, E, small_exits
from tests.support import assert_same, generator

NONE = (0.0, 0.0, 0.0, 0.0)


def gate_of(count: int) -> Gate:
    return Gate("confidence", (NONE,) * count, (0.5,) * count)


@pytest.mark.parametrize(
    ("blocks", "rows", "message"),
    [
        ((2, 1), 2, r"Plan: blocks must ascend from 1 on, got \[2, 1\]"),
        ((3, 3), 2, r"Plan: blocks must ascend from 1 on, got \[3, 3\]"),
        ((0, 3), 2, r"Plan: blocks must ascend from 1 on, got \[0, 3\]"),
        ((1, 2), 3, "Plan: gate must have one row per exit, got 3 for 2 exits"),
        ((), 1, "Plan: gate must have one row per exit, got 1 for 0 exits"),
    ],
)
def test_plans_that_do_not_fit(blocks: tuple[int, ...], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(blocks, gate_of(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {}}, "Exits: heads must hold one at least, got none"),
        ({"chosen": "c"}, "Exits: chosen must be one of b = 0.5, all, got 'c'"),
        ({"plans": {}}, "Exits: chosen must be one of none, got 'b = 0.5'"),
        ({"logit_scale": math.inf}, "Exits: logit_scale must be finite, got inf"),
        (
            {"plans": {"b = 0.5": Plan((2, 7), gate_of(2))}},
            "Exits: plan 'b = 0.5' must use heads that are there, got block 7",
        ),
    ],
)
def test_exits_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_exits(), **changes)


def test_using_chooses_another_plan() -> None:
    exits = small_exits()
    other = exits.using("all")
    assert exits.names == ("b = 0.5", "all") and other.names == ("all", "b = 0.5")
    assert other.plan is exits.plans["all"] and other.heads is exits.heads
    assert exits.plan.blocks == (2, 5, 11) and other.plan.blocks == (11,)
    assert other.using("b = 0.5").plan is exits.plan
    with pytest.raises(ValueError, match="chosen must be one of b = 0.5, all, got 'none'"):
        exits.using("none")


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_router_is_made_of_the_chosen_plan(kind: GateKind) -> None:
    exits = small_exits(kind)
    router = exits.router(backend="reference")
    plan = exits.plan
    assert router.blocks == plan.blocks and router.gate is plan.gate
    assert router.logit_scale == exits.logit_scale and router.compaction is exits.compaction
    assert exits.classes is not None
    assert_same(router.classes, exits.classes)
    assert router.classes.data_ptr() != exits.classes.data_ptr()
    for block, head, row in zip(plan.blocks, router.heads, plan.gate.weights, strict=True):
        assert_same(head.gamma, exits.heads[block].gamma)
        assert_same(head.gate, torch.tensor(row))
        assert head.backend == "reference" and head.macs == exits.heads[block].macs
    assert exits.router(device=torch.device("meta")).classes.device.type == "meta"


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_without_classes_only_class_free_gates_run(kind: GateKind) -> None:
    exits = small_exits(kind, classes=None)
    if kind in CLASS_FREE:
        assert_same(exits.router().classes, one_class(next(iter(exits.heads.values()))))
        return
    message = f"accelerate: exits must hold class texts for a {kind} gate, got none"
    with pytest.raises(ValueError, match=message):
        exits.router()


@pytest.mark.parametrize("hidden", [None, 4])
def test_one_class_is_a_unit_vector(hidden: int | None) -> None:
    head = make_head(D, E, hidden=hidden, has_class_token=False, seed=0)
    assert one_class(head).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_a_plan_without_exits_runs_to_the_end() -> None:
    exits = small_exits()
    closed = replace(exits, plans={"none": Plan((), gate_of(0))}, chosen="none")
    router = closed.router()
    routing = router.start(3, 5, is_static=False)
    z, y = torch.randn(3, 4, D, generator=generator(0)), torch.randn(3, E, generator=generator(1))
    assert not routing.is_done
    assert_same(routing.compact_all(z), z)
    assert_same(routing.merge(y), y)


@pytest.mark.parametrize(
    ("share", "dropped", "moved", "blocks", "pays"),
    [
        # dropped * blocks against share * moved: equality does not pay
        (0.1, 1, 10, 1, False), (0.1, 1, 9, 1, True), (0.5, 2, 12, 3, False),
        (0.5, 2, 11, 3, True), (0.0, 1, 1000, 1, True), (0.0, 0, 1000, 1, False),
    ],
)  # fmt: skip
def test_break_even_of_compaction(
    share: float, dropped: int, moved: int, blocks: int, pays: bool
) -> None:
    assert Compaction(share).pays(dropped=dropped, moved=moved, blocks=blocks) is pays


def test_exits_is_a_value() -> None:
    """Nothing in it can be set; what is made of it is new."""
    exits: Exits = small_exits()
    with pytest.raises(AttributeError):
        exits.chosen = "all"  # type: ignore[misc]
    assert exits.using("all") is not exits and exits.chosen == "b = 0.5"
