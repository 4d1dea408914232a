"""Programs of one launch that wait for each other, without one that could wait for ever.

Their tickets are zero before and after each launch (see workspace). Values that another program of
the same launch stored are read with cache_modifier=".cg", for L1 is not coherent.
"""

import triton
import triton.language as tl

from lraee.kernels.quantize_rows import quantize_block


@triton.jit
def last_to_arrive(ticket_ptr, COUNT):
    """True in the last of COUNT programs that call this with one ticket, which is then reset to 0.

    What the others stored before is visible to that program: their stores are ordered before their
    ticket by the barrier, tickets are acquire-release, and the barrier after it orders the loads.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    tl.debug_barrier()
    if is_last:
        tl.atomic_xchg(ticket_ptr, 0, sem="relaxed", scope="gpu")
    return is_last


@triton.jit
def quantize_together(
    x_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, first_row, end_row, K, stride_xm,
    ticket_ptr, SHARERS, SYMMETRIC: tl.constexpr, IS_ONE_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Quantizes the rows first_row .. end_row once among SHARERS programs that all need them.

    A program takes pieces of ROWS rows while there are any, then waits for those that others took.
    Whoever holds a piece is running and waits for nobody, so all get on, however few of the
    programs the GPU runs at a time and in whatever order: a program alone does all the work. The
    last to go on resets the ROW_BLOCK_TICKETS tickets: taken, done, gone on.
    """
    pieces = tl.cdiv(end_row - first_row, ROWS)
    piece = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    while piece < pieces:
        offs_m = first_row + piece * ROWS + tl.arange(0, ROWS)
        quantize_block(
            x_ptr, x_q_ptr, x_scale_ptr, x_zero_ptr, offs_m, offs_m < end_row, K, stride_xm,
            SYMMETRIC, IS_ONE_TILE, BLOCK_K,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(ticket_ptr + 1, 1, sem="release", scope="gpu")
        piece = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    while tl.atomic_add(ticket_ptr + 1, 0, sem="acquire", scope="gpu") < pieces:
        pass
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr + 2, 1, sem="acq_rel", scope="gpu") == SHARERS - 1:
        tl.atomic_xchg(ticket_ptr, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(ticket_ptr + 1, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(ticket_ptr + 2, 0, sem="relaxed", scope="gpu")
