"""Exits for CUDA without the host: which images exit after a probe, and who moves where.

Definition: lraee.ops.reference.exit_decide, and lraee.exits.router for a whole call. Tables are
those of exit_state. Per exit:

  exit_decide  one program. Row r of the `count` live rows exits where score[r] >= threshold (NaN
               does not). With `kept` rows that stay, row r < kept that exits is a hole, row
               r >= kept that stays is moved; the last of these fills the first hole. Sources lie at
               kept and behind it, destinations before it: tokens move in place, in any order, and
               none where no image exits.
  exit_move    few programs that share the moves and the embeddings of images that exit among them.
               Without either they return after one load.

and once, after the last block, exit_merge: embeddings of the images that stayed, by place.
What a gate remembers from exit to exit lies by place, so that only tokens and places move.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch
from lraee.kernels.common import LANES, convert, fold_lanes
from lraee.kernels.exit_probe import Probe
from lraee.kernels.exit_state import (
    EXIT_PLACE,
    EXIT_ROW,
    MOST_IMAGES,
    MOVED_FROM,
    MOVED_PLACE,
    MOVED_TO,
    SIZES,
    ExitState,
)

BLOCK_W = 4096
"""Values of an image's tokens that one program copies at once: 8 KB of float16, 4 warps."""
MOST_PROGRAMS = 256
"""Programs of exit_move share the pieces: where nothing moves, only these must start."""

_FROM, _TO, _PLACE, _EXIT_ROW, _EXIT_PLACE, _SIZES = (
    tl.constexpr(row * MOST_IMAGES)
    for row in (MOVED_FROM, MOVED_TO, MOVED_PLACE, EXIT_ROW, EXIT_PLACE, SIZES)
)


@triton.jit
def _steady(top1, place, is_row, last_top1_ptr, streak_ptr, IS_FIRST: tl.constexpr):
    """For how many exits before this one an image had this class; remembers both."""
    streak = tl.zeros_like(top1)
    if not IS_FIRST:
        before = tl.load(last_top1_ptr + place, mask=is_row, other=0)
        streak = tl.where(top1 == before, tl.load(streak_ptr + place, mask=is_row, other=0) + 1, 0)
    tl.store(last_top1_ptr + place, top1, mask=is_row)
    tl.store(streak_ptr + place, streak, mask=is_row)
    return streak


@triton.jit
def decide_rows(
    score_ptr, confidence_ptr, margin_ptr, variance_ptr, top1_ptr, embedding_ptr, threshold_ptr,
    images_ptr, place_ptr, kept_ptr, next_place_ptr, moves_ptr, result_ptr, depth_ptr, trace_ptr,
    last_top1_ptr, streak_ptr, depth, stride_trace, E,
    GATE: tl.constexpr, IS_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Decides over one call's rows, see the top.

    GATE: "given", the score as it is; "patience"; "static", a score of 0. ROWS = 1: an image alone
    cannot move, so its embedding is stored here.
    """
    row = tl.arange(0, ROWS)
    count = tl.load(images_ptr)
    is_row = row < count
    place = row
    if not IS_FIRST:
        place = tl.load(place_ptr + row, mask=is_row, other=0)
    threshold = tl.load(threshold_ptr)
    confidence = tl.load(confidence_ptr + row, mask=is_row, other=0.0)
    if GATE == "patience":
        top1 = tl.load(top1_ptr + row, mask=is_row, other=0).to(tl.int32)
        streak = _steady(top1, place, is_row, last_top1_ptr, streak_ptr, IS_FIRST)
        # An image with NaN has class 0 at every exit: it must not count as steady
        score = tl.where(confidence == confidence, streak.to(tl.float32), confidence)
    elif GATE == "static":
        score = tl.zeros((ROWS,), tl.float32)
    else:
        score = tl.load(score_ptr + row, mask=is_row, other=0.0)
    exits = is_row & (score >= threshold)

    trace = trace_ptr + place * stride_trace
    tl.store(trace, score, mask=is_row)
    tl.store(trace + 1, confidence, mask=is_row)
    tl.store(trace + 2, tl.load(margin_ptr + row, mask=is_row, other=0.0), mask=is_row)
    tl.store(trace + 3, tl.load(variance_ptr + row, mask=is_row, other=0.0), mask=is_row)
    tl.store(depth_ptr + place, tl.zeros_like(place) + depth, mask=exits)

    exiting = exits.to(tl.int32)
    kept = count - tl.sum(exiting, 0)
    tl.store(kept_ptr, kept)
    if ROWS == 1:
        tl.store(next_place_ptr + row, place)
        cols = tl.arange(0, BLOCK_E)
        is_taken = (kept < count) & (cols < E)
        embedding = tl.load(embedding_ptr + cols, mask=is_taken, other=0.0)
        y = convert(embedding, result_ptr.dtype.element_ty)
        tl.store(result_ptr + cols, y, mask=is_taken)
    else:
        is_hole = exits & (row < kept)
        is_moved = is_row & (row >= kept) & (exiting == 0)
        # Three ranks by one scan: counts of at most MOST_IMAGES take 8 bits each
        packed = is_hole.to(tl.int32) + (is_moved.to(tl.int32) << 8) + (exiting << 16)
        ranks = tl.cumsum(packed, 0) - packed
        num_moves = (tl.sum(packed, 0) >> 8) & 255
        k = num_moves - 1 - ((ranks >> 8) & 255)  # the last row first
        tl.store(moves_ptr + _FROM + k, row, mask=is_moved)
        tl.store(moves_ptr + _PLACE + k, place, mask=is_moved)
        tl.store(moves_ptr + _TO + (ranks & 255), row, mask=is_hole)
        tl.store(next_place_ptr + row, place, mask=(row < kept) & (exiting == 0))
        tl.store(moves_ptr + _EXIT_ROW + (ranks >> 16), row, mask=exits)
        tl.store(moves_ptr + _EXIT_PLACE + (ranks >> 16), place, mask=exits)
        tl.store(moves_ptr + _SIZES, num_moves)
        tl.store(moves_ptr + _SIZES + 1, count - kept)


@triton.jit(do_not_specialize=["depth", "stride_trace"])
def _exit_decide_kernel(
    score_ptr, confidence_ptr, margin_ptr, variance_ptr, top1_ptr, embedding_ptr, threshold_ptr,
    images_ptr, place_ptr, kept_ptr, next_place_ptr, moves_ptr, result_ptr, depth_ptr, trace_ptr,
    last_top1_ptr, streak_ptr, depth, stride_trace, E,
    GATE: tl.constexpr, IS_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program decides over all rows."""
    decide_rows(
        score_ptr, confidence_ptr, margin_ptr, variance_ptr, top1_ptr, embedding_ptr,
        threshold_ptr, images_ptr, place_ptr, kept_ptr, next_place_ptr, moves_ptr, result_ptr,
        depth_ptr, trace_ptr, last_top1_ptr, streak_ptr, depth, stride_trace, E,
        GATE, IS_FIRST, ROWS, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _exit_move_kernel(
    z_ptr, embedding_ptr, result_ptr, moves_ptr, next_place_ptr, W, E,
    BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tokens and places of rows that fill holes, and embeddings of rows that exit, see the top."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_moves = tl.load(moves_ptr + _SIZES)
    num_exits = tl.load(moves_ptr + _SIZES + 1)
    chunks = tl.cdiv(W, BLOCK_W)
    for item in range(program, num_moves * chunks, programs):
        k, chunk = item // chunks, item % chunks
        source = tl.load(moves_ptr + _FROM + k).to(tl.int64)
        hole = tl.load(moves_ptr + _TO + k).to(tl.int64)
        cols = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = cols < W
        z = tl.load(z_ptr + source * W + cols, mask=mask)
        tl.store(z_ptr + hole * W + cols, z, mask=mask)
        if chunk == 0:
            tl.store(next_place_ptr + hole, tl.load(moves_ptr + _PLACE + k))
    cols = tl.arange(0, BLOCK_E)
    mask = cols < E
    for k in range(program, num_exits, programs):
        row = tl.load(moves_ptr + _EXIT_ROW + k).to(tl.int64)
        place = tl.load(moves_ptr + _EXIT_PLACE + k).to(tl.int64)
        embedding = tl.load(embedding_ptr + row * E + cols, mask=mask, other=0.0)
        y = convert(embedding, result_ptr.dtype.element_ty)
        tl.store(result_ptr + place * E + cols, y, mask=mask)


@triton.jit(do_not_specialize=["depth"])
def _exit_merge_kernel(
    y_ptr, images_ptr, place_ptr, result_ptr, depth_ptr, depth, E, BLOCK_E: tl.constexpr
):  # fmt: skip
    """result[place[r]] = y[r] of one live row."""
    row = tl.program_id(0)
    if row >= tl.load(images_ptr):
        return
    place = tl.load(place_ptr + row)
    cols = tl.arange(0, BLOCK_E)
    y = tl.load(y_ptr + row * E + cols, mask=cols < E)
    tl.store(result_ptr + place * E + cols, y, mask=cols < E)
    tl.store(depth_ptr + place, depth)


@triton.jit
def _agreement_kernel(
    embedding_ptr, variance_ptr, numbers_ptr, images_ptr, place_ptr, direction_ptr, score_ptr, E,
    IS_FIRST: tl.constexpr, E_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Score of the agreement gate of one live row, as lraee.exits.gate.score.

    direction = e / |e|, cosine = <direction, that of the exit before>, sums in lane order;
    score = sigmoid(w1 cosine + w3 variance + constant) through float64, NaN at the first exit.
    """
    row = tl.program_id(0)
    if row >= tl.load(images_ptr):
        return
    place = row
    if not IS_FIRST:
        place = tl.load(place_ptr + row)
    squares = tl.zeros((1, LANES), tl.float32)
    for c in tl.static_range(E_CHUNKS):
        cols = c * LANES + tl.arange(0, LANES)[None, :]
        e = tl.load(embedding_ptr + row * E + cols, mask=cols < E, other=0.0)
        squares += e * e
    length = tl.sqrt_rn(fold_lanes(squares))
    length = tl.where(length < 1e-12, 1e-12, length)[:, None]  # keeps NaN, as maximum would not
    products = tl.zeros((1, LANES), tl.float32)
    for c in tl.static_range(E_CHUNKS):
        cols = c * LANES + tl.arange(0, LANES)[None, :]
        mask = cols < E
        e = tl.load(embedding_ptr + row * E + cols, mask=mask, other=0.0)
        direction = tl.div_rn(e, tl.broadcast_to(length, e.shape))
        before_ptr = direction_ptr + place * E + cols
        if not IS_FIRST:
            products += direction * tl.load(before_ptr, mask=mask, other=0.0)
        tl.store(before_ptr, direction, mask=mask)
    rows = row + tl.arange(0, 1)
    if IS_FIRST:
        score = tl.full((1,), float("nan"), tl.float32)
    else:
        cosine = fold_lanes(products)
        variance = tl.load(variance_ptr + rows)
        weighted = tl.load(numbers_ptr + 1) * cosine + tl.load(numbers_ptr + 2) * variance
        logit = weighted + tl.load(numbers_ptr + 3)
        score = (1.0 / (1.0 + tl.exp(-logit.to(tl.float64)))).to(tl.float32)
    tl.store(score_ptr + rows, score)


def exit_decide(state: ExitState, e: int, probe: Probe, gate: str, depth: int) -> None:
    """Decides over the live rows at exit e: the counts, places and moves after it.

    Args:
      state: its tables up to exit e - 1 are read, those of exit e written.
      e: number of the exit.
      probe: what exit_probe gave for the rows before it.
      gate: "given", with the score of the probe; "confidence", "patience" or "static".
      depth: blocks before the exit.
    """
    embedding, top1, confidence, margin, variance, score = probe
    is_first, E = e == 0, embedding.shape[1]
    launch.start(
        _exit_decide_kernel, (1,),
        confidence if gate == "confidence" else score, confidence, margin, variance, top1,
        embedding, state.numbers[e], state.images[e], state.places[max(e - 1, 0)],
        state.images[e + 1], state.places[e], state.moves, state.result, state.depth,
        state.trace[:, e], state.top1, state.streak, depth, state.trace.stride(0), E,
        GATE="given" if gate == "confidence" else gate, IS_FIRST=is_first,
        ROWS=triton.next_power_of_2(state.capacity), BLOCK_E=triton.next_power_of_2(E),
        num_warps=4,
    )  # fmt: skip


def exit_move(state: ExitState, e: int, embedding: Tensor, z: Tensor) -> None:
    """Compacts tokens in place, and stores the embeddings of the images that exit.

    Args:
      state: after exit_decide of exit e.
      embedding: float32 [capacity, E], of the rows before the exit.
      z: [capacity, L, D], contiguous: the tokens after the exit's block, or after a later one.
    """
    if state.capacity == 1:
        return  # exit_decide has stored what there is
    assert z.is_contiguous(), f"exit_move: z must be contiguous, got strides {z.stride()}"
    W, E = z[0].numel(), embedding.shape[1]
    items = state.capacity // 2 * triton.cdiv(W, BLOCK_W)
    launch.start(
        _exit_move_kernel, (min(max(items, state.capacity), MOST_PROGRAMS),),
        z, embedding, state.result, state.moves, state.places[e], W, E,
        BLOCK_W=BLOCK_W, BLOCK_E=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def exit_merge(state: ExitState, y: Tensor, depth: int) -> None:
    """Stores the embeddings y [capacity, E] of the images that stayed to full depth.

    Args:
      state: after the last exit.
      y: in the type of state.result.
      depth: blocks of the tower.
    """
    E = y.shape[1]
    launch.start(
        _exit_merge_kernel, (state.capacity,),
        y.contiguous(), state.images[-1], state.places[-1], state.result, state.depth, depth, E,
        BLOCK_E=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip


def agreement_score(state: ExitState, e: int, embedding: Tensor, variance: Tensor) -> Tensor:
    """Scores float32 [capacity] of the agreement gate at exit e; remembers directions.

    Args:
      state: its `direction` is read and written.
      embedding, variance: float32 [capacity, E] and [capacity], of the live rows.
    """
    score = torch.empty_like(variance)
    E = embedding.shape[1]
    launch.start(
        _agreement_kernel, (state.capacity,),
        embedding, variance, state.numbers[e], state.images[e], state.places[max(e - 1, 0)],
        state.direction, score, E,
        IS_FIRST=e == 0, E_CHUNKS=triton.cdiv(E, 64), num_warps=1,
    )  # fmt: skip
    return score
