"""Inter-CTA synchronisation of one launch by tickets, free of deadlock.

A launch is cut into items, numbered so that each depends on earlier ones alone, and each program
draws the next. A program that waits for an item thus waits for one that already runs and itself
waits for earlier items alone: all make progress, however few programs the GPU runs at a time and in
whatever order it starts them. In the interpreter, one after another, no program ever waits.

Tickets are zero before and after each launch (see workspace). L1 is not coherent: the acquire of
wait_for and last_to_arrive empties it (CCTL.IVALL in the machine code), and what is read once is
read with cache_modifier=".cg", around it.
"""

import triton
import triton.language as tl


@triton.jit
def draw(ticket_ptr, COUNT):
    """The next of COUNT items; the program that draws the last one resets the ticket to 0."""
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if item == COUNT - 1:
        tl.atomic_xchg(ticket_ptr, 0, sem="relaxed", scope="gpu")
    return item


@triton.jit
def arrive(ticket_ptr):
    """Publishes that this program stored its item.

    The barrier orders the stores of all threads before the ticket.
    """
    tl.debug_barrier()
    tl.atomic_add(ticket_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(ticket_ptr, COUNT):
    """Returns when COUNT programs arrived; what they stored is visible then.

    Each program that waited calls leave once, later.
    """
    while tl.atomic_add(ticket_ptr, 0, sem="acquire", scope="gpu") < COUNT:
        pass
    tl.debug_barrier()


@triton.jit
def leave(ticket_ptr, COUNT):
    """The last to leave, of COUNT programs that arrived or waited, resets the ticket to 0."""
    if tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu") == COUNT - 1:
        tl.atomic_xchg(ticket_ptr, 0, sem="relaxed", scope="gpu")


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
