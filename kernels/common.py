"""Arithmetic shared by the kernels: exact rounding, the fixed summation order, quantizer steps.

[NOTE: a row as chunks] A row of length D is held in registers as a tuple of ceil(D / 64) tiles
[ROWS, 64], the missing part zero. Lane j of every tile then belongs to lane j of
lraee.ops.reference.lane_sum, so adding tiles in order and folding the last one in half gives that
sum bit for bit, on any GPU and in the interpreter, whatever the layout of the tiles.

Kernels are launched with enable_fp_fusion=False: a fused multiply-add would round once where the
definition rounds twice. Where the CPU fuses them (activations), so do kernels, explicitly.
"""

import torch
import triton
import triton.language as tl

from lraee.kernels import gates

GELU, GELU_TANH = tl.constexpr(gates.GELU), tl.constexpr(gates.GELU_TANH)
QUICK_GELU = tl.constexpr(gates.QUICK_GELU)
GELU_CLAMP, GELU_SQUARINGS = tl.constexpr(gates.GELU_CLAMP), tl.constexpr(gates.GELU_SQUARINGS)
QUICK_GELU_CLAMP = tl.constexpr(gates.QUICK_GELU_CLAMP)
QUICK_GELU_SQUARINGS = tl.constexpr(gates.QUICK_GELU_SQUARINGS)
NEGATIVE_ZERO_BITS = tl.constexpr(-(1 << 31))
"""Triton makes +0 of a constant -0.0."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, which handles bfloat16 by truncating and by bit patterns."""

LANES = tl.constexpr(64)
INFINITY = tl.constexpr(float("inf"))
SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it leaves no bit for fractions, so the sum is rounded half to even."""


@triton.jit
def live_count(count, live_ptr, rows_per_image, HAS_LIVE: tl.constexpr):
    """How many of `count` rows (or images) are live; see live_rows.operands."""
    if HAS_LIVE:
        count = tl.minimum(count, tl.load(live_ptr) * rows_per_image)
    return count


@triton.jit
def round_half_even(x):
    """The nearest integer of |x| < 2**22, ties to even."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _fold_half(lanes, ROWS: tl.constexpr, HALF: tl.constexpr):
    """low + high; of two numbers tl.sum has one order, and needs an exchange of threads alone."""
    return tl.sum(tl.reshape(lanes, (ROWS, 2, HALF)), axis=1)


@triton.jit
def fold_lanes(lanes):
    """[ROWS, 64] -> [ROWS]: lane[i] += lane[i + half] for half = 32, 16, … 1."""
    ROWS: tl.constexpr = lanes.shape[0]
    lanes = _fold_half(lanes, ROWS, 32)
    lanes = _fold_half(lanes, ROWS, 16)
    lanes = _fold_half(lanes, ROWS, 8)
    lanes = _fold_half(lanes, ROWS, 4)
    lanes = _fold_half(lanes, ROWS, 2)
    return tl.reshape(_fold_half(lanes, ROWS, 1), (ROWS,))


@triton.jit
def sum_16(x):
    """[ROWS, 16] -> [ROWS], folded in half; tl.sum leaves the order to the layout."""
    ROWS: tl.constexpr = x.shape[0]
    x = _fold_half(x, ROWS, 8)
    x = _fold_half(x, ROWS, 4)
    x = _fold_half(x, ROWS, 2)
    return tl.reshape(_fold_half(x, ROWS, 1), (ROWS,))


@triton.jit
def lane_sum(row):
    """Sum of a row held as chunks, in the order of lraee.ops.reference.lane_sum: [ROWS]."""
    lanes = row[0] + 0.0
    for c in tl.static_range(1, len(row)):
        lanes += row[c]
    return fold_lanes(lanes)


@triton.jit
def load_row(ptr, offs_row, row_mask, D: tl.constexpr, WIDTH: tl.constexpr):
    """Row(s) starting at ptr + offs_row in tiles [ROWS, WIDTH] of their own type, 0 beyond D.

    A single row is taken to be there: nothing is compared but columns of a last tile not full.
    """
    row = ()
    for c in tl.static_range((D + WIDTH - 1) // WIDTH if D > 0 else 1):
        cols = (tl.arange(0, WIDTH) + c * WIDTH)[None, :]
        places = ptr + offs_row[:, None] + cols
        if (c + 1) * WIDTH > D:
            x = tl.load(places, mask=row_mask[:, None] & (cols < D), other=0.0)
        elif row_mask.shape[0] > 1:
            x = tl.load(places, mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(places)
        row = row + (x,)  # type: ignore[assignment]
    return row


@triton.jit
def store_tile(ptr, offs_row, row_mask, x, c: tl.constexpr, D: tl.constexpr):
    """Tile c of rows in tiles, as load_row has them."""
    WIDTH: tl.constexpr = x.shape[1]
    cols = (tl.arange(0, WIDTH) + c * WIDTH)[None, :]
    places = ptr + offs_row[:, None] + cols
    if (c + 1) * WIDTH > D:
        tl.store(places, x, mask=row_mask[:, None] & (cols < D))
    elif row_mask.shape[0] > 1:
        tl.store(places, x, mask=row_mask[:, None])
    else:
        tl.store(places, x)


@triton.jit
def load_chunks(ptr, offs_row, row_mask, D: tl.constexpr):
    """load_row as float32 chunks of LANES values."""
    row = ()
    loaded = load_row(ptr, offs_row, row_mask, D, LANES)
    for c in tl.static_range(len(loaded)):
        row = row + (loaded[c].to(tl.float32),)  # type: ignore[assignment]
    return row


@triton.jit
def _load_vector(ptr, c: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Chunk c of a vector [D] as float32 [ROWS, LANES], where the threads of a row need it."""
    cols = tl.broadcast_to((tl.arange(0, LANES) + c * LANES)[None, :], (ROWS, LANES))
    if (c + 1) * LANES > D:
        x = tl.load(ptr + cols, mask=cols < D, other=0.0)
    else:
        x = tl.load(ptr + cols)
    return x.to(tl.float32)


@triton.jit
def normalise_row(row, gamma_ptr, beta_ptr, eps, D: tl.constexpr, HAS_BETA: tl.constexpr):
    """LayerNorm of a row held as chunks: ((x - mean) * rstd) * gamma + beta, padding zero.

    RMSNorm without beta: the mean counts as 0.
    """
    size = tl.cast(D, tl.float32)
    mean = tl.div_rn(lane_sum(row), size) if HAS_BETA else tl.zeros((row[0].shape[0],), tl.float32)
    centred = ()
    squares = ()
    for c in tl.static_range(len(row)):
        difference = row[c]
        if HAS_BETA:
            difference = difference - mean[:, None]
            if (c + 1) * LANES > D:
                cols = tl.arange(0, LANES) + c * LANES
                difference = tl.where(cols[None, :] < D, difference, 0.0)
        centred = centred + (difference,)  # type: ignore[assignment]
        squares = squares + (difference * difference,)  # type: ignore[assignment]
    variance = tl.div_rn(lane_sum(squares), size)
    rstd = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    result = ()
    ROWS: tl.constexpr = row[0].shape[0]
    for c in tl.static_range(len(row)):
        y = (centred[c] * rstd[:, None]) * _load_vector(gamma_ptr, c, D, ROWS)
        if HAS_BETA:
            y += _load_vector(beta_ptr, c, D, ROWS)
        result = result + (y,)  # type: ignore[assignment]
    return result


@triton.jit
def value_range(x):
    """(min(x, 0), max(x, 0)) of each value; what is not finite makes the range infinite."""
    is_finite = tl.abs(x) < INFINITY
    lo = tl.where(is_finite, tl.minimum(x, 0.0), 0.0)
    return lo, tl.where(is_finite, tl.maximum(x, 0.0), INFINITY)


@triton.jit
def tile_range(x):
    """Smallest and largest value of each row of a tile, 0 among them."""
    lo, hi = value_range(x)
    return tl.min(lo, axis=1), tl.max(hi, axis=1)


@triton.jit
def row_range(row):
    """tile_range of a row held as tiles.

    Tiles are compared in their own type, which is exact, NaN kept: an instruction compares two
    values of float16. Threads exchange values once, at the end.
    """
    lo, hi = row[0], row[0]
    for c in tl.static_range(1, len(row)):
        lo = tl.minimum(lo, row[c], propagate_nan=tl.PropagateNan.ALL)
        hi = tl.maximum(hi, row[c], propagate_nan=tl.PropagateNan.ALL)
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    is_finite = (tl.abs(lo) < INFINITY) & (tl.abs(hi) < INFINITY)
    lo = tl.where(is_finite, tl.minimum(lo, 0.0), 0.0)
    hi = tl.where(is_finite, tl.maximum(hi, 0.0), INFINITY)
    return tl.min(lo, axis=1), tl.max(hi, axis=1)


@triton.jit
def quantizer(lo, hi, SYMMETRIC: tl.constexpr):
    """Scale, zero point (as float32) and validity of rows with this range; see quantize_rows.

    A row that is not valid, of an infinite range, must be given q = 0; its scale is NaN and its
    zero point 0.
    """
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-lo, hi), tl.full(lo.shape, 127.0, tl.float32))
    else:
        scale = tl.div_rn(hi - lo, tl.full(lo.shape, 255.0, tl.float32))
    is_valid = scale < INFINITY
    scale = tl.where(is_valid & (scale >= SMALLEST_SCALE), scale, 1.0)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = round_half_even(-128.0 - tl.div_rn(tl.where(is_valid, lo, 0.0), scale))
        zero = tl.where(is_valid, tl.minimum(tl.maximum(zero, -128.0), 127.0), 0.0)
    return tl.where(is_valid, scale, float("nan")), zero, is_valid


@triton.jit
def _quotients(x, scale, IS_TINY: tl.constexpr):
    """x / scale of a tile with |x| <= 255 scale, good enough to be rounded to an integer.

    div_rn takes some 70 instruction slots a value; it was most of what quantize_rows did (H200).
    Here the reciprocal r of a row is divided once. q = x r is off by less than 1.5 units in the
    last place, q + r (x - q scale) by less than one, so that rounds to the integer of the rounded
    quotient except beside a tie; there, for each scale in [1, 2) and each x within 6 units of a
    tie, all 2.8e10 cases were compared and none differs. With an r that is one unit off 122 do.
    IS_TINY: scales may be so small that the remainder underflows. Both sides are then scaled by a
    power of two first, so that 1 <= scale < 2: exact, as 2^-126 <= scale < 2^121.
    """
    if IS_TINY:
        power = ((254 << 23) - (scale.to(tl.int32, bitcast=True) & 0x7F800000)).to(
            tl.float32, bitcast=True
        )
        scale = scale * power
        x = x * power[:, None]
    r = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    r = tl.broadcast_to(r[:, None], x.shape)
    q = x * r
    return tl.fma(tl.fma(q, tl.broadcast_to(-scale[:, None], x.shape), x), r, q)


@triton.jit
def quantize_tile(x, scale, zero, is_valid, SYMMETRIC: tl.constexpr):
    """clamp(round(x / scale) + zero) of a tile [ROWS, BLOCK] with one quantizer per row, int8.

    x: any float type. Rounded and clamped as one float: adding ROUNDER leaves no bit for fractions,
    the lowest bits of the sum are the integer, and limits are those of the row less its zero point.
    Of a row that is not valid both limits are those of q = 0, which is what NaN becomes: tl.maximum
    takes the number. Converting floats to integers would run at an eighth of the speed.
    """
    IS_TINY: tl.constexpr = x.dtype != tl.float16  # scales of float16 rows are 2^-33 at least
    x = x.to(tl.float32)
    scale = tl.where(is_valid, scale, 1.0)
    if INTERPRETED:  # where a fused multiply-add is not fused
        q = tl.div_rn(x, scale[:, None])
    else:
        q = _quotients(x, scale, IS_TINY)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    SHIFT: tl.constexpr = ROUNDER + 64.0
    lowest = tl.where(is_valid, (-127.0 if SYMMETRIC else -128.0) - zero, 0.0) + SHIFT
    highest = tl.where(is_valid, 127.0 - zero, 0.0) + SHIFT
    sums = tl.minimum(tl.maximum(q + SHIFT, lowest[:, None]), highest[:, None])
    # Their lowest byte is the integer + 64: the 64 is there to be taken off as an integer. Without
    # it the lowest byte of the float is stored as it is, for which ptxas 12.8 makes a saturating
    # conversion: every value came out as -1 (seen on an H200 where values go to shared memory one
    # by one).
    shift = zero.to(tl.int32) - 64
    return (sums.to(tl.int32, bitcast=True) + shift[:, None]).to(tl.int8)


@triton.jit
def fused_multiply_add(x, y, z):
    """x * y + z of float32, rounded once, in the interpreter too, whose tl.fma rounds twice.

    There: the product is exact in float64. The sum is rounded to odd, its last bit telling whether
    anything is missing, after which rounding to float32 gives the float next to x * y + z.
    """
    if INTERPRETED:
        product = tl.cast(x, tl.float64) * tl.cast(y, tl.float64)
        z = tl.cast(z, tl.float64)
        total = product + z
        z_part = total - product
        missing = (product - (total - z_part)) + (z - z_part)
        bits = total.to(tl.int64, bitcast=True)
        is_even = (bits & 1) == 0
        outwards = tl.where((missing > 0) == (total > 0), 1, -1)
        bits += tl.where(is_even & ((missing > 0) | (missing < 0)), outwards, 0)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def gated(
    y, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr, CLAMP: tl.constexpr,
    SQUARINGS: tl.constexpr,
):  # fmt: skip
    """y * G(y) = max(y, 0) - t * G(-t), t = |y|, of a table of kernels.gates: NaN stays NaN.

    The operations of `gated` in csrc/cpu/numerics/gated_activation.h, so the bits of the CPU.
    """
    size = tl.abs(y)
    if INTERPRETED:
        t = tl.where(size > CLAMP, CLAMP, size)
    else:
        t = tl.minimum(size, CLAMP, propagate_nan=tl.PropagateNan.ALL)
    root = fused_multiply_add(t, COEFFICIENTS[DEGREE], COEFFICIENTS[DEGREE - 1])
    for i in tl.static_range(2, DEGREE + 1):
        root = fused_multiply_add(root, t, COEFFICIENTS[DEGREE - i])
    for _ in tl.static_range(SQUARINGS):
        root = root * root
    if INTERPRETED:
        positive = tl.where(y < 0.0, 0.0, y)
    else:
        # In PTX -0 is below +0. max(y, -0) keeps the sign of a zero, and that of a negative y
        # is lost in the sum below
        negative_zero = tl.cast(NEGATIVE_ZERO_BITS, tl.float32, bitcast=True)
        positive = tl.maximum(y, negative_zero, propagate_nan=tl.PropagateNan.ALL)
    # root is never 0, t may be: before Triton 3.8 -t is 0 - t, which is +0 for 0
    return fused_multiply_add(t, -root, positive)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """none; gelu: y * Phi(y); gelu_tanh: its tanh form; quick_gelu: y * sigmoid(1.702 y); silu.

    Bit for bit those of the CPU, but for silu.
    """
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    if ACTIVATION == "gelu":
        y = gated(y, GELU, 7, GELU_CLAMP, GELU_SQUARINGS)
    if ACTIVATION == "gelu_tanh":
        y = gated(y, GELU_TANH, 8, GELU_CLAMP, GELU_SQUARINGS)
    if ACTIVATION == "quick_gelu":
        y = gated(y, QUICK_GELU, 10, QUICK_GELU_CLAMP, QUICK_GELU_SQUARINGS)
    return y


@triton.jit
def convert(y, dtype: tl.constexpr):
    """float32 in another float type, rounded half to even, in the interpreter too."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    return y.to(dtype)
