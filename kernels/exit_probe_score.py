"""Last part of exit_probe: the best two of all classes, and the decision.

See lraee.kernels.exit_probe, [NOTE: probe algebra].
"""

import triton
import triton.language as tl

from lraee.kernels.common import INFINITY, LANES, fold_lanes, sum_16

BLOCK_C = tl.constexpr(16)
"""Classes taken in at once. Part of the order of sums: the same for every batch size."""


def classes_per_program(K: int) -> int:
    """Classes dealt to one program: by their number alone, so that batches cannot differ.

    64, of which four numbers are stored, a sixteenth of their logits; at most 64 programs.
    """
    return max(64, 16 * -(-K // (16 * 64)))


@triton.jit
def _length(embedding, row_mask, E, E_CHUNKS: tl.constexpr):
    """max(|e|, 1e-12) of rows of pointers, summed in lane order."""
    ROWS: tl.constexpr = row_mask.shape[0]
    lanes = tl.zeros((ROWS, LANES), tl.float32)
    for c in tl.static_range(E_CHUNKS):
        cols = c * LANES + tl.arange(0, LANES)
        mask = row_mask[:, None] & (cols < E)[None, :]
        e = tl.load(embedding + cols[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        lanes += e * e
    return tl.maximum(tl.sqrt_rn(fold_lanes(lanes)), 1e-12)


@triton.jit
def _add_products(lanes, c, embedding, row_mask, class_rows, class_mask, E):
    """lanes[b, k, j] + e[b, 64 c + j] * t[k, 64 c + j]."""
    cols = c * LANES + tl.arange(0, LANES)
    col_mask = (cols < E)[None, :]
    e_mask = row_mask[:, None] & col_mask
    e = tl.load(embedding + cols[None, :], mask=e_mask, other=0.0, cache_modifier=".cg")
    t = tl.load(class_rows + cols[None, :], mask=class_mask[:, None] & col_mask, other=0.0)
    return lanes + e[:, None, :] * t.to(tl.float32)[None, :, :]


@triton.jit
def _block_logits(
    embedding, row_mask, length, classes_ptr, offs_k, last_k, E, logit_scale,
    E_CHUNKS: tl.constexpr,
):  # fmt: skip
    """logit_scale * cosine of ROWS images with BLOCK_C classes, -inf beyond last_k: [ROWS, 16]."""
    ROWS: tl.constexpr = row_mask.shape[0]
    lanes = tl.zeros((ROWS, BLOCK_C, LANES), tl.float32)
    class_rows = classes_ptr + offs_k.to(tl.int64)[:, None] * E
    class_mask = offs_k < last_k
    if ROWS == 1:
        # Unrolled: all loads of a class at once
        for c in tl.static_range(E_CHUNKS):
            lanes = _add_products(lanes, c, embedding, row_mask, class_rows, class_mask, E)
    else:
        # A loop: unrolled, the embeddings of 16 images would be kept in registers, and spilled
        for c in tl.range(0, E_CHUNKS, num_stages=3):
            lanes = _add_products(lanes, c, embedding, row_mask, class_rows, class_mask, E)
    product = tl.reshape(fold_lanes(tl.reshape(lanes, (ROWS * BLOCK_C, LANES))), (ROWS, BLOCK_C))
    logit = tl.div_rn(product, tl.broadcast_to(length[:, None], (ROWS, BLOCK_C))) * logit_scale
    return tl.where((offs_k < last_k)[None, :], logit, -INFINITY)


@triton.jit
def _merge(best, second, total, top, new_best, new_second, new_total, new_top):
    """Takes a later run of classes into (best, second, total, top); see [NOTE: probe algebra].

    Strictly greater, so that the lowest index of a tie stays.
    """
    largest = tl.maximum(best, new_best)
    total = total * tl.exp(best - largest) + new_total * tl.exp(new_best - largest)
    second = tl.maximum(tl.minimum(best, new_best), tl.maximum(second, new_second))
    top = tl.where(new_best > best, new_top, top)
    return largest, second, total, top


@triton.jit
def finish(
    part_ptr, variance_ptr, gate_ptr, top1_ptr, confidence_ptr, margin_ptr, score_ptr, block, B,
    PARTS, ROWS: tl.constexpr,
):  # fmt: skip
    """Takes the four numbers of all parts into one and writes the decision."""
    # One lane a part, and fold_lanes for their sum
    parts = tl.arange(0, LANES)[:, None]
    part_ptr += block.to(tl.int64) * PARTS * (4 * ROWS)
    base = part_ptr + parts * (4 * ROWS) + tl.arange(0, ROWS)[None, :]
    mask = parts < PARTS
    bests = tl.trans(tl.load(base, mask=mask, other=-INFINITY, cache_modifier=".cg"))
    seconds = tl.trans(tl.load(base + ROWS, mask=mask, other=-INFINITY, cache_modifier=".cg"))
    totals = tl.trans(tl.load(base + 2 * ROWS, mask=mask, other=0.0, cache_modifier=".cg"))
    tops = tl.trans(tl.load(base + 3 * ROWS, mask=mask, other=0.0, cache_modifier=".cg"))
    tops = tops.to(tl.int32, bitcast=True)
    best = tl.max(bests, axis=1)
    # Of equal bests the lowest class stays; the others are its seconds
    top = tl.min(tl.where(bests == best[:, None], tops, 2147483647), axis=1)
    others = tl.where(tops == top[:, None], -INFINITY, bests)
    second = tl.max(tl.maximum(others, seconds), axis=1)
    total = fold_lanes(totals * tl.exp(bests - best[:, None]))
    confidence = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), total)
    margin = confidence * (1.0 - tl.exp(second - best))
    top *= (total == total).to(tl.int32)
    offs_b = block * ROWS + tl.arange(0, ROWS)
    mask = offs_b < B
    variance = tl.load(variance_ptr + offs_b, mask=mask, other=0.0, cache_modifier=".cg")
    weighted = tl.load(gate_ptr) * confidence + tl.load(gate_ptr + 1) * margin
    logit = (weighted + tl.load(gate_ptr + 2) * variance) + tl.load(gate_ptr + 3)
    tl.store(top1_ptr + offs_b, top.to(tl.int64), mask=mask)
    tl.store(confidence_ptr + offs_b, confidence, mask=mask)
    tl.store(margin_ptr + offs_b, margin, mask=mask)
    tl.store(score_ptr + offs_b, 1.0 / (1.0 + tl.exp(-logit)), mask=mask)


@triton.jit
def score_classes(
    embedding_ptr, classes_ptr, logit_scale, part_ptr, block, part, B, E, K, CLASSES, PARTS,
    E_CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the four numbers of ROWS images over CLASSES classes."""
    offs_b = block * ROWS + tl.arange(0, ROWS)
    row_mask = offs_b < B
    embedding = embedding_ptr + offs_b.to(tl.int64)[:, None] * E
    length = _length(embedding, row_mask, E, E_CHUNKS)

    best = tl.full((ROWS,), -INFINITY, tl.float32)
    second = tl.full((ROWS,), -INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.zeros((ROWS,), tl.int32)
    first_k = part * CLASSES
    last_k = tl.minimum(first_k + CLASSES, K)
    for k in range(first_k, last_k, BLOCK_C):
        offs_k = k + tl.arange(0, BLOCK_C)
        logit = _block_logits(
            embedding, row_mask, length, classes_ptr, offs_k, last_k, E, logit_scale, E_CHUNKS
        )
        block_best = tl.max(logit, axis=1)
        is_best = logit == block_best[:, None]
        block_top = tl.min(tl.where(is_best, offs_k[None, :], last_k), axis=1)
        others = tl.where(offs_k[None, :] == block_top[:, None], -INFINITY, logit)
        block_total = sum_16(tl.exp(logit - block_best[:, None]))
        best, second, total, top = _merge(
            best, second, total, top, block_best, tl.max(others, axis=1), block_total, block_top
        )

    base = part_ptr + (block.to(tl.int64) * PARTS + part) * (4 * ROWS) + tl.arange(0, ROWS)
    tl.store(base, best, cache_modifier=".cg")
    tl.store(base + ROWS, second, cache_modifier=".cg")
    tl.store(base + 2 * ROWS, total, cache_modifier=".cg")
    tl.store(base + 3 * ROWS, top.to(tl.float32, bitcast=True), cache_modifier=".cg")
