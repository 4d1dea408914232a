"""exit_probe for CUDA: leave the tower here? Three launches, tokens read once, no host round trip.

[NOTE: probe algebra] For each image, over its N patch tokens z_i (class token left out):

  1. pool. With shift = z_1 and e_i = z_i - shift, one reading of z gives s1 = sum e_i and
     s2 = sum e_i^2, hence both
       mean     = shift + s1 / N,
       variance = sum_d (s2 - s1^2 / N) / N  =  1/N sum_i ||z_i - mean||^2,
     for the spread about the mean does not change when a constant is taken off every z_i. Without
     the shift, s2 - s1^2/N would cancel: residual streams carry channels whose mean is a hundred
     times their spread, and float32 has 24 bits.
     A head may also see the class token z_0, which is the LayerNorm's row beside the mean:
     pooled = (mean, z_0), of P = 2 D values instead of D. Its channels are read by the program
     that pools them, so z is still read once; the variance is one of patches in both cases.
     The last program of an image to finish has the whole row at hand (6 or 9 KB, in L2): it
     normalises and quantizes it, and adds up the variance, so that neither needs a launch.
  2. head. quantize(gelu(W1 x + b1)) is int8_linear_quantized as it stands.
  3. score. cos_k = <e, t_k> / |e| needs the whole embedding e = W2 hidden + b2: the first programs
     store 32 values of it each, and the others wait for these (see meeting) instead of for another
     launch. Each goes once through its classes with four numbers per image:
       best b, its class, second best b', and total = sum exp(l_k - b),
     where taking in a block with numbers (c, c', total_c) gives
       b_new = max(b, c),  b'_new = max(min(b, c), max(b', c')),
       total_new = total exp(b - b_new) + total_c exp(c - b_new).
     The last program of an image to finish takes the programs' four numbers, at most 64 of each,
     into one in the same way, all at once. Then
       confidence = p_(1) = exp(b - b) / total = 1 / total,
       margin = p_(1) - p_(2) = confidence (1 - exp(b' - b)),
       score = sigmoid(g0 confidence + g1 margin + g2 variance + g3).
     Logits of all classes are never in memory: what is stored is 16 bytes per image and program.

How classes are dealt to programs depends on their number alone and every float sum has a written
order, so an image gets the same bits in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import launch, workspace
from lraee.kernels.common import (
    INFINITY,
    LANES,
    fold_lanes,
    sum_16,
)
from lraee.kernels.configs import ProbeConfig, probe_config
from lraee.kernels.exit_probe_pool import pool_tokens
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.meeting import arrive, draw, last_to_arrive, wait_for
from lraee.kernels.quantize_rows import Quantized
from lraee.kernels.workspace import Workspace

Probe = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

TILE_B = tl.constexpr(16)
"""Rows of the smallest tensor-core product: images of one program, or one image and 15 copies."""

EMBEDDED = tl.constexpr(32)
"""Values of the embedding that one program computes."""

BLOCK_C = tl.constexpr(16)
"""Classes taken in at once. Part of the order of sums: the same for every batch size."""


@triton.jit
def _dequantize(acc, x_scale, x_zero, w_scale_ptr, w_sum_ptr, b_ptr, offs_n, N, HAS_BIAS: tl.constexpr):  # fmt: skip  # noqa: E501
    """(acc - x_zero * w_sum) * (x_scale * w_scale) + b, zero beyond column N."""
    mask = offs_n < N
    w_sum = tl.load(w_sum_ptr + offs_n, mask=mask, other=0)
    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask, other=0.0)
    acc -= x_zero[:, None] * w_sum[None, :]
    y = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_n, mask=mask, other=0.0)[None, :]
    return tl.where(mask[None, :], y, 0.0)


@triton.jit
def _embed(
    x_q_ptr, x_scale_ptr, x_zero_ptr, embedding_ptr, w_ptr, w_scale_ptr, w_sum_ptr, b_ptr,
    block, tile, B, H, E, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Stores EMBEDDED values of embedding = W2 hidden + b2 of ROWS images."""
    tile_b = tl.arange(0, TILE_B)
    # With ROWS = 1 every row of the product is the same image
    offs_b = block * ROWS + tile_b % ROWS
    row_mask = offs_b < B
    rows = offs_b.to(tl.int64)[:, None]
    offs_e = tile * EMBEDDED + tl.arange(0, EMBEDDED)
    acc = tl.zeros((TILE_B, EMBEDDED), tl.int32)
    for h in range(0, H, BLOCK_H):
        cols = (h + tl.arange(0, BLOCK_H))[None, :]
        x = tl.load(x_q_ptr + rows * H + cols, mask=row_mask[:, None] & (cols < H), other=0)
        w_mask = (offs_e < E)[:, None] & (cols < H)
        w = tl.load(w_ptr + offs_e[:, None] * H + cols, mask=w_mask, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    scale = tl.load(x_scale_ptr + offs_b, mask=row_mask, other=0.0)
    zero = tl.load(x_zero_ptr + offs_b, mask=row_mask, other=0)
    y = _dequantize(acc, scale, zero, w_scale_ptr, w_sum_ptr, b_ptr, offs_e, E, HAS_BIAS)
    mask = (row_mask & (tile_b < ROWS))[:, None] & (offs_e < E)[None, :]
    tl.store(embedding_ptr + rows * E + offs_e[None, :], y, mask=mask)


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
def _finish(
    part_ptr, variance_ptr, gate_ptr, top1_ptr, confidence_ptr, margin_ptr, score_ptr, block, B,
    PARTS, ROWS: tl.constexpr,
):  # fmt: skip
    """Takes the four numbers of all parts into one and writes the decision."""
    # One lane a part, and fold_lanes for their sum
    parts = tl.arange(0, LANES)[:, None]
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
    variance = tl.load(variance_ptr + offs_b, mask=mask, other=0.0)
    weighted = tl.load(gate_ptr) * confidence + tl.load(gate_ptr + 1) * margin
    logit = (weighted + tl.load(gate_ptr + 2) * variance) + tl.load(gate_ptr + 3)
    tl.store(top1_ptr + offs_b, top.to(tl.int64), mask=mask)
    tl.store(confidence_ptr + offs_b, confidence, mask=mask)
    tl.store(margin_ptr + offs_b, margin, mask=mask)
    tl.store(score_ptr + offs_b, 1.0 / (1.0 + tl.exp(-logit)), mask=mask)


@triton.jit(do_not_specialize=["B"])
def _score_kernel(
    x_q_ptr, x_scale_ptr, x_zero_ptr, w_ptr, w_scale_ptr, w_sum_ptr, b_ptr, classes_ptr,
    logit_scale, gate_ptr, variance_ptr, embedding_ptr, top1_ptr, confidence_ptr, margin_ptr,
    score_ptr, part_ptr, ticket_ptr, B, H, E, K, CLASSES, PARTS,
    HAS_W2: tl.constexpr, HAS_BIAS: tl.constexpr, E_CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Embedding of ROWS images, its best two of CLASSES classes, and in the last part the score."""
    item = tl.program_id(0)
    tiles = 0
    if HAS_W2:
        item = draw(ticket_ptr, tl.num_programs(0))
        ticket_ptr += 1
        tiles = tl.cdiv(E, EMBEDDED)
        blocks = tl.cdiv(B, ROWS)
        if item < blocks * tiles:
            _embed(
                x_q_ptr, x_scale_ptr, x_zero_ptr, embedding_ptr, w_ptr, w_scale_ptr, w_sum_ptr,
                b_ptr, item // tiles, item % tiles, B, H, E, HAS_BIAS, ROWS, BLOCK_H,
            )  # fmt: skip
            arrive(ticket_ptr + item // tiles)
            return
        item -= blocks * tiles
    block = item // PARTS
    part = item % PARTS
    ticket_ptr += block
    if HAS_W2:
        wait_for(ticket_ptr, tiles)
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

    part_ptr += block.to(tl.int64) * PARTS * (4 * ROWS)
    base = part_ptr + part * (4 * ROWS) + tl.arange(0, ROWS)
    tl.store(base, best, cache_modifier=".cg")
    tl.store(base + ROWS, second, cache_modifier=".cg")
    tl.store(base + 2 * ROWS, total, cache_modifier=".cg")
    tl.store(base + 3 * ROWS, top.to(tl.float32, bitcast=True), cache_modifier=".cg")
    # The tiles of the embedding arrived by the same ticket
    if last_to_arrive(ticket_ptr, tiles + PARTS):
        _finish(
            part_ptr, variance_ptr, gate_ptr, top1_ptr, confidence_ptr, margin_ptr, score_ptr,
            block, B, PARTS, ROWS,
        )  # fmt: skip


def classes_per_program(K: int) -> int:
    """Classes dealt to one program: by their number alone, so that batches cannot differ.

    64, of which four numbers are stored, a sixteenth of their logits; at most 64 programs.
    """
    return max(64, 16 * -(-K // (16 * 64)))


def _floats(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def exit_probe(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    w1: Tensor,
    w1_scale: Tensor,
    w1_sum: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    w2_scale: Tensor | None,
    w2_sum: Tensor | None,
    b2: Tensor | None,
    classes: Tensor,
    logit_scale: float,
    gate: Tensor,
    *,
    config: ProbeConfig | None = None,
    space: Workspace | None = None,
) -> Probe:
    """Exit head and gate of one depth in three launches; see lraee.reference.exit_probe.

    Args:
      z, …, gate: as in lraee.reference.exit_probe; w1 int8 [H, P], w2 int8 [E, H] or None.
      config: tiles and warps; chosen by shape when None.
      space: where the programs of an image meet; that of the current stream when None.
    Returns: embedding, top1, confidence, margin, variance, score.
    """
    (B, _, D), E = z.shape, classes.shape[1]
    H, P = w1_scale.shape[0], gamma.shape[0]
    assert w1.shape == (H, P), f"exit_probe: w1 must have the CUDA layout [{H}, {P}]"
    assert w2 is None or w2.shape == (E, H), f"exit_probe: w2 must have the layout [{E}, {H}]"
    z = z if D <= 1 or z.stride(2) == 1 else z.contiguous()
    confidence, margin, variance, score = _floats((4, B), z).unbind()
    top1 = torch.empty(B, dtype=torch.int64, device=z.device)
    if not B:
        return _floats((B, E), z), top1, confidence, margin, variance, score
    config = config or probe_config(B)
    space = space or workspace.of_current_stream(z.device)
    assert space.tickets.numel() >= B, f"exit_probe: at most {space.tickets.numel()} images"
    x = pool_tokens(z, gamma, beta, eps, variance, config=config, space=space)
    hidden: Quantized | None = None
    if w2 is None:
        embedding = int8_linear(*x, w1, w1_scale, w1_sum, b1, space=space)
    else:
        embedding = _floats((B, E), z)
        hidden = int8_linear_quantized(
            *x, w1, w1_scale, w1_sum, b1, activation="gelu", symmetric=False, space=space
        )
    probe = embedding, top1, confidence, margin, variance, score
    layer = w2, w2_scale, w2_sum, b2
    _launch_score(hidden, layer, classes, logit_scale, gate, probe, config, space)
    return probe


def _launch_score(
    hidden: Quantized | None, layer: tuple[Tensor | None, ...], classes: Tensor, logit_scale: float,
    gate: Tensor, probe: Probe, config: ProbeConfig, space: Workspace,
) -> None:  # fmt: skip
    """Third launch: top1, confidence, margin and score; the embedding, where there is a layer."""
    embedding, top1, confidence, margin, variance, score = probe
    (B, E), K = embedding.shape, classes.shape[0]
    per_program = classes_per_program(K)
    programs, blocks = triton.cdiv(K, per_program), triton.cdiv(B, config.rows)
    parts = _floats((blocks, programs, 4, config.rows), embedding)
    assert blocks < space.tickets.numel(), f"exit_probe: at most {space.tickets.numel() - 1} blocks"
    tiles = 0 if hidden is None else triton.cdiv(E, int(EMBEDDED))
    absent = embedding
    launch.start(
        _score_kernel, (blocks * (tiles + programs),),
        *(hidden or (absent, absent, absent)),
        *(absent if part is None else part.contiguous() for part in layer),
        classes.contiguous(), logit_scale, gate.contiguous(), variance,
        embedding, top1, confidence, margin, score, parts, space.tickets,
        B, 0 if hidden is None else hidden[0].shape[1], E, K, per_program, programs,
        HAS_W2=hidden is not None, HAS_BIAS=layer[3] is not None, E_CHUNKS=triton.cdiv(E, 64),
        ROWS=config.rows, BLOCK_H=config.block_h, num_warps=config.num_warps,
    )  # fmt: skip
