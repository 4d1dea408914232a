"""exit_probe for CUDA: leave the tower here? One launch, tokens read once, no host round trip.

Each part needs all of the part before it. Instead of ending a launch there, programs draw items in
the order of the parts and wait for what theirs depends on (see tickets).

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
     normalises and quantizes it, and adds up the variance.
  2. head. hidden = gelu(W1 x + b1), 32 values a program; the last one of its images quantizes it.
     embedding e = W2 hidden + b2 likewise. A head of one layer leaves e at once.
  3. score. cos_k = <e, t_k> / |e| needs the whole of e. Each program goes once through its classes
     with four numbers per image:
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

from lraee.kernels import device, launch, live_rows, workspace
from lraee.kernels.common import activate
from lraee.kernels.configs import ProbeConfig, probe_config
from lraee.kernels.exit_probe_pool import normalise_pooled, pool_channels
from lraee.kernels.exit_probe_score import classes_per_program, finish, score_classes
from lraee.kernels.operands import PackedLinear, ProbeHead
from lraee.kernels.quantize_rows import empty_quantized, quantize_block
from lraee.kernels.tickets import arrive, draw, last_to_arrive, wait_for
from lraee.kernels.workspace import Workspace

Probe = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

TILE_B = tl.constexpr(16)
"""Rows of the smallest tensor-core product: images of one block, or one image and 15 copies."""

TILE_N = tl.constexpr(32)
"""Values of a layer that one program computes."""


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
def _layer(
    x_q_ptr, x_scale_ptr, x_zero_ptr, w_ptr, w_scale_ptr, w_sum_ptr, b_ptr, y_ptr, block, tile,
    B, N, K, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores TILE_N values of y = act(W x + b) of ROWS images, as int8_linear."""
    tile_b = tl.arange(0, TILE_B)
    # With ROWS = 1 every row of the product is the same image
    offs_b = block * ROWS + tile_b % ROWS
    row_mask = offs_b < B
    rows = offs_b.to(tl.int64)[:, None]
    offs_n = tile * TILE_N + tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_B, TILE_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        cols = (k + tl.arange(0, BLOCK_K))[None, :]
        x_mask = row_mask[:, None] & (cols < K)
        x = tl.load(x_q_ptr + rows * K + cols, mask=x_mask, other=0, cache_modifier=".cg")
        w_mask = (offs_n < N)[:, None] & (cols < K)
        w = tl.load(w_ptr + offs_n[:, None] * K + cols, mask=w_mask, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    scale = tl.load(x_scale_ptr + offs_b, mask=row_mask, other=0.0, cache_modifier=".cg")
    zero = tl.load(x_zero_ptr + offs_b, mask=row_mask, other=0, cache_modifier=".cg")
    y = _dequantize(acc, scale, zero, w_scale_ptr, w_sum_ptr, b_ptr, offs_n, N, HAS_BIAS)
    y = activate(y, ACTIVATION)
    mask = (row_mask & (tile_b < ROWS))[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + rows * N + offs_n[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["B"])
def _exit_probe_kernel(
    z_ptr, gamma_ptr, beta_ptr, eps, w1_ptr, w1_scale_ptr, w1_sum_ptr, b1_ptr,
    w2_ptr, w2_scale_ptr, w2_sum_ptr, b2_ptr, classes_ptr, logit_scale, gate_ptr,
    pooled_ptr, spread_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr,
    hidden_ptr, hidden_q_ptr, hidden_scale_ptr, hidden_zero_ptr, part_ptr,
    embedding_ptr, top1_ptr, confidence_ptr, margin_ptr, variance_ptr, score_ptr, ticket_ptr,
    live_ptr, B, N, D, P, H, E, K, CLASSES, PARTS, stride_b, stride_l,
    HAS_W2: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    HAS_CLASS_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    E_CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """One item: channels of an image, a tile of a layer, or classes; see [NOTE: probe algebra].

    Tickets behind that of the items: per image, its channels; per block of ROWS images, its rows
    and the tiles that read them; its hidden rows, the tiles of its embedding, and its parts.
    HAS_LIVE: only the first live_ptr[0] images are probed. All programs count items and tickets by
    that number, so arrivals add up; what is drawn beyond the last item ends at once.
    """
    item = draw(ticket_ptr, tl.num_programs(0))
    if HAS_LIVE:
        B = tl.minimum(tl.load(live_ptr), B)
    blocks = tl.cdiv(B, ROWS)
    image_ticket_ptr = ticket_ptr + 1
    row_ticket_ptr = image_ticket_ptr + B
    score_ticket_ptr = row_ticket_ptr + blocks

    channels = tl.cdiv(D, BLOCK_D)
    if item < B * channels:
        image = (item // channels).to(tl.int64)
        pool_channels(
            z_ptr, pooled_ptr, spread_ptr, image, item % channels, N, D, P, stride_b, stride_l,
            HAS_CLASS_TOKEN, BLOCK_D, UNROLL,
        )  # fmt: skip
        if last_to_arrive(image_ticket_ptr + image, channels):
            normalise_pooled(
                pooled_ptr, spread_ptr, gamma_ptr, beta_ptr, eps, x_q_ptr, x_scale_ptr,
                x_zero_ptr, variance_ptr, image, D, P,
            )  # fmt: skip
            arrive(row_ticket_ptr + image // ROWS)
        return
    item -= B * channels

    tiles = tl.cdiv(H, TILE_N)
    if item < blocks * tiles:
        block = item // tiles
        images = tl.minimum(B - block * ROWS, ROWS)
        wait_for(row_ticket_ptr + block, images)
        _layer(
            x_q_ptr, x_scale_ptr, x_zero_ptr, w1_ptr, w1_scale_ptr, w1_sum_ptr, b1_ptr,
            hidden_ptr, block, item % tiles, B, H, P, HAS_B1, "gelu" if HAS_W2 else "none", ROWS,
            BLOCK_K,
        )  # fmt: skip
        if last_to_arrive(row_ticket_ptr + block, images + tiles):
            if HAS_W2:
                rows = block * ROWS + tl.arange(0, ROWS)
                quantize_block(
                    hidden_ptr, hidden_q_ptr, hidden_scale_ptr, hidden_zero_ptr, rows, rows < B,
                    H, H, False, False, BLOCK_H, ".cg",
                )  # fmt: skip
            arrive(score_ticket_ptr + block)
        return
    item -= blocks * tiles

    arrived = 1
    if HAS_W2:
        tiles = tl.cdiv(E, TILE_N)
        arrived += tiles
        if item < blocks * tiles:
            block = item // tiles
            wait_for(score_ticket_ptr + block, 1)
            _layer(
                hidden_q_ptr, hidden_scale_ptr, hidden_zero_ptr, w2_ptr, w2_scale_ptr, w2_sum_ptr,
                b2_ptr, embedding_ptr, block, item % tiles, B, E, H, HAS_B2, "none", ROWS, BLOCK_K,
            )  # fmt: skip
            arrive(score_ticket_ptr + block)
            return
        item -= blocks * tiles

    if HAS_LIVE:
        if item >= blocks * PARTS:
            return
    block = item // PARTS
    wait_for(score_ticket_ptr + block, arrived)
    score_classes(
        embedding_ptr, classes_ptr, logit_scale, part_ptr, block, item % PARTS, B, E, K, CLASSES,
        PARTS, E_CHUNKS, ROWS,
    )  # fmt: skip
    if last_to_arrive(score_ticket_ptr + block, arrived + PARTS):
        finish(
            part_ptr, variance_ptr, gate_ptr, top1_ptr, confidence_ptr, margin_ptr, score_ptr,
            block, B, PARTS, ROWS,
        )  # fmt: skip


def _floats(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def exit_probe(
    z: Tensor,
    head: ProbeHead,
    *,
    config: ProbeConfig | None = None,
    space: Workspace | None = None,
) -> Probe:
    """Exit head and gate of one depth in one launch; see lraee.ops.reference.exit_probe.

    Args:
      z, head: as in lraee.ops.reference.exit_probe; weights int8 [H, P] and [E, H].
      config: tiles and warps; chosen by shape when None.
      space: tickets of the launch; those of the current stream when None.
    Returns: embedding, top1, confidence, margin, variance, score; any content in rows of images
      that are not live.
    """
    (gamma, beta, eps), first, second, classes, logit_scale, gate = head
    (B, L, D), (K, E) = z.shape, classes.shape
    H, P = first.N, gamma.shape[0]
    assert P in (D, 2 * D), f"exit_probe: gamma must have shape [{D}] or [{2 * D}]"
    assert first.w.shape == (H, P), f"exit_probe: first must have the CUDA layout [{H}, {P}]"
    assert second is None or second.w.shape == (E, H), f"exit_probe: second must be [{E}, {H}]"
    z = z if D <= 1 or z.stride(2) == 1 else z.contiguous()
    confidence, margin, variance, score = _floats((4, B), z).unbind()
    top1 = torch.empty(B, dtype=torch.int64, device=z.device)
    if not B:
        return _floats((B, E), z), top1, confidence, margin, variance, score
    config = config or probe_config(B, device.arch(z.device))
    space = space or workspace.of_current_stream(z.device)

    per_program = classes_per_program(K)
    parts, blocks = triton.cdiv(K, per_program), triton.cdiv(B, config.rows)
    needed = 1 + B + 2 * blocks
    assert needed <= space.tickets.numel(), f"exit_probe: too many images: {B}"
    embedding = _floats((B, E), z)
    # What an affine head leaves is the embedding itself
    hidden = embedding if second is None else _floats((B, H), z)
    x = empty_quantized(B, P, z.device)
    hidden_q = x if second is None else empty_quantized(B, H, z.device)
    programs = B * triton.cdiv(D, config.block_d) + blocks * parts
    for width in (H,) if second is None else (H, E):
        programs += blocks * triton.cdiv(width, int(TILE_N))
    live = live_rows.current()
    assert live is None or live.capacity == B, f"exit_probe: {B} images, live rows of others"
    live_ptr = gate if live is None else live.images
    launch.start(
        _exit_probe_kernel, (programs,),
        z, gamma.contiguous(), beta.contiguous(), eps,
        *_layer_operands(first, gate), *_layer_operands(second, gate),
        classes.contiguous(), logit_scale, gate.contiguous(),
        _floats((B, P), z), _floats((B, D), z), *x,
        hidden, *hidden_q, _floats((blocks, parts, 4, config.rows), z),
        embedding, top1, confidence, margin, variance, score, space.tickets,
        live_ptr, B, L - 1, D, P, H, E, K, per_program, parts, z.stride(0), z.stride(1),
        HAS_W2=second is not None, HAS_B1=first.bias is not None,
        HAS_B2=second is not None and second.bias is not None,
        HAS_CLASS_TOKEN=P != D, BLOCK_D=config.block_d, UNROLL=config.unroll,
        E_CHUNKS=triton.cdiv(E, 64), ROWS=config.rows, BLOCK_K=config.block_k,
        BLOCK_H=config.block_h, HAS_LIVE=live is not None, num_warps=config.num_warps,
    )  # fmt: skip
    return embedding, top1, confidence, margin, variance, score


def _layer_operands(layer: PackedLinear | None, absent: Tensor) -> list[Tensor]:
    """w, w_scale, w_sum and bias; `absent`, which is never read, for what is not there."""
    operands = (None,) * 4 if layer is None else layer[:4]
    return [absent if operand is None else operand.contiguous() for operand in operands]
