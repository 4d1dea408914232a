"""What exits on the device cost by account."""

import itertools

import pytest

from bench.exit_account import exit_cost, exit_launches
from bench.gpu_account import FLOAT, PERSISTENT, int8_us
from bench.gpu_parts import GPUS
from bench.shapes import B16, B32, L14

TOWERS = (B32, B16, L14)


def test_launches_of_an_exit() -> None:
    """An image alone moves nothing."""
    names = [launch.name for launch in exit_launches(B32, 1)]
    assert names == ["exit_probe", "exit_decide", "exit_merge"]
    names = [launch.name for launch in exit_launches(B32, 8)]
    assert names == ["exit_probe", "exit_decide", "exit_move", "exit_merge"]
    assert [launch.programs for launch in exit_launches(B16, 128)][1:] == [1, 256, 128]


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
def test_no_image_exits_for_two_percent(tower: object) -> None:
    """2 % of the tower from batch 8 on, 2.5 % below, on every GPU of the account."""
    for gpu, batch in itertools.product(GPUS, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)):
        for form in (FLOAT, PERSISTENT):
            share = exit_cost(gpu, tower, batch).us / int8_us(gpu, tower, batch, form)  # type: ignore[arg-type]
            assert share <= (0.02 if batch >= 8 else 0.025), (gpu.name, batch, form.name, share)


def test_what_runs_beside_a_block() -> None:
    """Few rows do not fill a GPU."""
    rows = [
        batch * B32.L for batch in (1, 8, 16, 24, 32) if exit_cost(GPUS[-1], B32, batch).is_beside
    ]
    assert max(rows) == 800
    assert not exit_cost(GPUS[-1], B16, 8).is_beside
