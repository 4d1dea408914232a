"""All interleavings of the protocols between warps and between programs, and seeded errors."""

import pytest

from bench.barrier_model import SEEDED, SOUND, Broken, PingPong, Tickets

protocols = pytest.mark.parametrize


@protocols("protocol", SOUND, ids=str)
def test_sound(protocol: PingPong | Tickets) -> None:
    assert protocol.explore() > 30


@protocols("protocol", SEEDED, ids=str)
def test_a_seeded_error_is_found(protocol: PingPong | Tickets) -> None:
    with pytest.raises(Broken):
        protocol.explore()


def test_without_the_order_of_groups_a_phase_is_missed() -> None:
    """The second group reads a stage before its tile is there, by the parity of another phase."""
    with pytest.raises(Broken, match=r"step 3 reads -1"):
        PingPong(has_order=False).explore()


def test_programs_deadlock_where_rows_are_drawn_before_their_tiles() -> None:
    with pytest.raises(Broken, match="deadlock"):
        Tickets(pieces_first=True, resident=2).explore()
