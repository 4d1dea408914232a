"""Exits decided on the device, in the interpreter: as the definition, and as the router."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.exits.gate import Gate, GateKind
from lraee.exits.router import Compaction, Router
from lraee.kernels import exit_decide as kernels
from lraee.kernels.exit_state import MOST_IMAGES, ExitState
from lraee.ops import reference
from tests.support import assert_same, generator

VALUES = (math.nan, math.inf, -math.inf, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0)
KINDS: tuple[GateKind, ...] = ("learned", "confidence", "patience", "static")
ROWS, MOST_EXITS = 8, 3


@triton.jit
def _decide_many(
    score_ptr, confidence_ptr, top1_ptr, threshold_ptr, images_ptr, place_ptr, kept_ptr,
    next_place_ptr, moves_ptr, depth_ptr, trace_ptr, last_top1_ptr, streak_ptr, block_ptr,
    GATE: tl.constexpr, IS_FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One table a program: the interpreter takes milliseconds to start a launch."""
    t = tl.program_id(0)
    rows = t * ROWS
    kernels.decide_rows(
        score_ptr + rows, confidence_ptr + rows, confidence_ptr + rows, confidence_ptr + rows,
        top1_ptr + rows, score_ptr, threshold_ptr + t, images_ptr + t, place_ptr + rows,
        kept_ptr + t, next_place_ptr + rows, moves_ptr + t * 6 * 128, score_ptr,
        depth_ptr + rows, trace_ptr + rows * 4, last_top1_ptr + rows, streak_ptr + rows,
        tl.load(block_ptr + t), 4, 1, GATE, IS_FIRST, ROWS, 1,
    )  # fmt: skip


class Tables:
    """Random tables of one kind of gate: T calls of up to ROWS images through up to m exits."""

    def __init__(self, kind: GateKind, T: int, seed: int) -> None:
        source = random.Random(seed)
        self.kind, self.T = kind, T
        self.m = 1 if kind == "static" else MOST_EXITS
        self.images = [source.choice((1, 1, 2, 3, 5, 7, ROWS)) for _ in range(T)]

        def table(values: tuple[float, ...], *shape: int) -> Tensor:
            count = int(torch.Size(shape).numel())
            return torch.tensor([source.choice(values) for _ in range(count)]).view(shape)

        self.scores = table(VALUES, T, ROWS, self.m)
        self.confidences = table((math.nan, 0.25, 0.5, 1.0), T, ROWS, self.m)
        self.top1 = table((0, 1, 2), T, ROWS, self.m)
        self.thresholds = table(VALUES[1:], T, self.m)
        self.blocks = torch.tensor(
            [sorted(source.sample(range(1, 9), self.m)) for _ in range(T)], dtype=torch.int32
        )

    def probe(self, t: int, e: int, places: list[int]) -> Any:
        """What an exit measures of the rows that hold these images; an embedding names both."""
        confidence = self.confidences[t, places, e]
        embedding = torch.tensor([[100.0 * e + place] for place in places])
        part = confidence, confidence, confidence, self.scores[t, places, e]
        return (embedding, self.top1[t, places, e].long(), *part)

    def by_router(self, t: int) -> tuple[list[list[int]], list[float], list[int]]:
        """Places after each exit, embeddings and depths of one call, by the eager router."""
        B, blocks = self.images[t], tuple(self.blocks[t].tolist())
        gate = Gate(self.kind, ((0.0,) * 4,) * self.m, tuple(self.thresholds[t].tolist()))
        router = Router(
            blocks, [], gate, classes=torch.ones(1, 1), logit_scale=1.0, compaction=Compaction(0.0)
        )
        routing = router.start(B, 9, is_static=False)
        routing = replace(routing, record=SimpleRecord())
        places, z = [], torch.arange(float(B)).view(B, 1, 1)
        for e in range(self.m):
            if routing.decide(e, self.probe(t, e, routing.places), z) and not routing.is_done:
                z = routing.compact(z, is_own=True)
            places.append([place for place in routing.places if place >= 0])
            if routing.is_done:
                places += [[]] * (self.m - e - 1)
                break
        assert routing.is_done or z[:, 0, 0].tolist() == places[-1]
        depth = [routing.record.exit_block.get(image, 9) for image in range(B)]  # type: ignore[union-attr]
        result = [math.nan] * B if routing.result is None else routing.result[:, 0].tolist()
        return (
            places,
            [math.nan if d == 9 else y for y, d in zip(result, depth, strict=True)],
            depth,
        )


class SimpleRecord:
    """Notes nothing but where images exit."""

    def __init__(self) -> None:
        self.exit_block: dict[int, int] = {}

    def note_blocks(self, *_: object) -> None:
        """Nothing."""

    note_probe = note_blocks

    def note_exits(self, images: list[int], depth: int) -> None:
        """See Record."""
        self.exit_block.update(dict.fromkeys(images, depth))


def check_tables(tables: Tables) -> int:
    """All calls at once, exit by exit, against the router call by call; how many images exit."""
    T, each = tables.T, torch.arange(tables.T)[:, None]

    def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, 99, dtype=dtype)

    expected = [tables.by_router(t) for t in range(T)]
    count = torch.tensor(tables.images, dtype=torch.int32)
    places = torch.arange(ROWS, dtype=torch.int32).repeat(T, 1)
    depth, last_top1, streak = table(T, ROWS), table(T, ROWS), table(T, ROWS)
    result = torch.full((T, ROWS), math.nan)
    how = tables.kind if tables.kind in ("patience", "static") else "given"
    for e in range(tables.m):
        # rows beyond the count hold anything: here those of image 0
        at = torch.where(torch.arange(ROWS) < count[:, None], places, 0).long()
        confidence = tables.confidences[each, at, e].contiguous()
        score = confidence if tables.kind == "confidence" else tables.scores[each, at, e]
        kept, after, moves = table(T), table(T, ROWS), table(T, 6, MOST_IMAGES)
        trace = table(T, ROWS, 4, dtype=torch.float32)
        _decide_many[(T,)](
            score.contiguous(), confidence, tables.top1[each, at, e].contiguous(),
            tables.thresholds[:, e].contiguous(), count, places, kept, after, moves, depth, trace,
            last_top1, streak, tables.blocks[:, e].contiguous(),
            GATE=how, IS_FIRST=e == 0, ROWS=ROWS,
        )  # fmt: skip
        for t in range(T):
            num_moves, num_exits = moves[t, 5, :2].tolist()
            sources, holes, moved = moves[t, :3, :num_moves].tolist()
            assert all(
                source >= kept[t] > hole for source, hole in zip(sources, holes, strict=True)
            )
            after[t, holes] = torch.tensor(moved, dtype=torch.int32)
            for place in moves[t, 4, :num_exits].tolist():
                result[t, place] = 100.0 * e + place
            assert after[t, : kept[t]].tolist() == expected[t][0][e], (tables.kind, t, e)
        count, places = kept, after
    exits = 0
    for t, (_, embeddings, depths) in enumerate(expected):
        B = tables.images[t]
        actual = [9 if d == 99 else d for d in depth[t, :B].tolist()]
        assert actual == depths, (tables.kind, t)
        assert_same(result[t, :B], torch.tensor(embeddings), kind=tables.kind, table=t)
        exits += sum(d < 9 for d in depths)
    return exits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [40, pytest.param(2_500, marks=pytest.mark.slow)])
def test_random_tables_as_the_router(kind: GateKind, T: int) -> None:
    """Any scores (NaN, infinities and ties too), thresholds, numbers of images and exits: 10,000
    tables in the slow run.
    """
    assert check_tables(Tables(kind, T, seed=T)) > T / 4


# Whole launches


def call_of(B: int, capacity: int, seed: int, share: float, dtype: torch.dtype) -> Any:
    """State, probe and tokens of one exit; about this share of the images exits."""
    source = generator(seed)
    E, L, D = 5, 3, 7
    result = torch.full((capacity, E), 77.0, dtype=dtype)
    numbers = torch.tensor([[1.0 - share, 0.0, 0.0, 0.0]])
    images = torch.tensor([B], dtype=torch.int32)
    state = ExitState.allocate(images, numbers, result, compares=False)
    score = torch.rand(capacity, generator=source)
    embedding = torch.randn(capacity, E, generator=source)
    embedding[B:] = score[B:] = math.nan
    embedding[0, 0] = math.nan
    top1 = torch.zeros(capacity, dtype=torch.int64)
    probe = embedding, top1, *torch.rand(3, capacity, generator=source), score
    return state, probe, torch.randn(capacity, L, D, generator=source).to(dtype)


def check_call(B: int, capacity: int, seed: int, share: float, dtype: torch.dtype) -> int:
    state, probe, z = call_of(B, capacity, seed, share, dtype)
    exits, survivors = reference.exit_decide(probe[5][:B], float(state.numbers[0, 0]))
    kept, before = len(survivors), z.clone()
    kernels.exit_decide(state, 0, probe, "given", 3)
    kernels.exit_move(state, 0, probe[0], z)
    assert int(state.images[1]) == kept
    assert_same(z[:kept], before[survivors], B=B, seed=seed)
    assert_same(z[kept:], before[kept:], B=B, seed=seed)
    assert_same(state.places[0][:kept], survivors.int(), B=B, seed=seed)
    y = torch.randn(capacity, 5).to(dtype)
    kernels.exit_merge(state, y, 9)
    expected, depth = torch.full_like(state.result, 77.0), torch.full((B,), 9, dtype=torch.int32)
    expected[exits] = probe[0][exits].to(dtype)
    expected[survivors] = y[:kept]
    depth[exits] = 3
    assert_same(state.result, expected, B=B, seed=seed)
    assert_same(state.depth[:B], depth, B=B, seed=seed)
    score, features = probe[5][:B, None], torch.stack(probe[2:5], dim=1)[:B]
    assert_same(state.trace[:B, 0], torch.cat([score, features], dim=1), B=B, seed=seed)
    return len(exits)


SHARES = (-1.0, 0.1, 0.3, 0.5, 0.8, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_launches(dtype: torch.dtype) -> None:
    """None, some and all exit; rows of padding hold NaN and are neither read nor written."""
    cases = [(1, 1), (1, 2), (3, 4), (5, 6), (8, 8), (13, 16), (33, 48)]
    counts = {
        check_call(B, capacity, seed, share, dtype)
        for seed, (B, capacity) in enumerate(cases)
        for share in (SHARES if B < 9 else SHARES[2:4])
    }
    assert {0, 1, 8} <= counts


def test_tokens_of_more_than_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several chunks, and more of them than programs."""
    monkeypatch.setattr(kernels, "BLOCK_W", 4)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 3)
    for seed in range(4):
        check_call(11, 12, seed, 0.5, torch.float32)


def test_no_image_is_left() -> None:
    """A count of zero: the next exit and the merge do nothing."""
    state, probe, z = call_of(4, 4, 0, 2.0, torch.float32)
    kernels.exit_decide(state, 0, probe, "given", 3)
    kernels.exit_move(state, 0, probe[0], z)
    result, before = state.result.clone(), z.clone()
    more = replace(
        state, images=(*state.images, torch.full((1,), 9, dtype=torch.int32)),
        places=(*state.places, state.places[0].clone()), numbers=state.numbers.repeat(2, 1),
        trace=state.trace.repeat(1, 2, 1),
    )  # fmt: skip
    kernels.exit_decide(more, 1, probe, "given", 5)
    kernels.exit_move(more, 1, probe[0], z)
    kernels.exit_merge(more, torch.zeros_like(result), 9)
    assert int(more.images[2]) == 0
    assert_same(more.result, result)
    assert_same(z, before)
    assert more.depth.tolist() == [3] * 4


@pytest.mark.parametrize("E", [5, 64, 130])
def test_agreement_of_two_exits(E: int) -> None:
    """The score of lraee.exits.gate, with the square root that CUDA has; rows moved in between."""
    gate = Gate("agreement", ((3.0, 0.0, 0.01, -1.0),) * 2, (math.inf,) * 2)
    B, source = 5, generator(E)
    numbers = torch.tensor([[math.inf, 3.0, 0.01, -1.0]] * 2)
    images = torch.tensor([B], dtype=torch.int32)
    state = ExitState.allocate(images, numbers, torch.zeros(B, E), compares=True)
    first, second = torch.randn(2, B, E, generator=source)
    first[1], second[2], first[3] = math.nan, math.inf, 0.0
    variance = torch.rand(B, generator=source)
    assert kernels.agreement_score(state, 0, first, variance).isnan().all()
    state.images[1].fill_(4)
    order = torch.tensor([4, 1, 2, 3, 0])
    state.places[0].copy_(order)
    actual = kernels.agreement_score(state, 1, second, variance)
    directions = [part / _length(part)[:, None] for part in (first, second)]
    assert_same(state.direction[order[:4]], directions[1][:4])
    cosine = reference.lane_sum(directions[1] * directions[0][order])
    w1, _, w3, constant = gate.weights[1]
    expected = reference.steady_sigmoid(w1 * cosine + w3 * variance + constant)
    assert_same(actual[:4], expected[:4], E=E)
    assert expected[[1, 2]].isnan().all() and expected[[0, 3]].isfinite().all()


def _length(x: Tensor) -> Tensor:
    return reference.rows.square_root(reference.lane_sum(x * x)).clamp(min=1e-12)


def test_more_images_than_a_program_decides_over() -> None:
    images, numbers = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="must have at most 128 rows, got 129"):
        ExitState.allocate(images, numbers, torch.zeros(129, 2), compares=False)
