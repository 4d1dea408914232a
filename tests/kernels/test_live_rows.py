"""The scope in which launches skip the rows of images that left the tower."""

import threading

import pytest
import torch

from lraee.kernels import live_rows
from lraee.kernels.live_rows import LiveRows


def test_the_scope_ends_with_its_block_and_is_of_its_thread():
    live = LiveRows(torch.ones(1, dtype=torch.int32), 4)
    elsewhere = []
    with live_rows.using(live):
        assert live_rows.current() is live
        thread = threading.Thread(target=lambda: elsewhere.append(live_rows.current()))
        thread.start()
        thread.join()
    assert live_rows.current() is None and elsewhere == [None]


def test_rows_are_shared_out_to_images():
    live = LiveRows(torch.ones(1, dtype=torch.int32), 4)
    assert live.rows_per_image(200) == 50
    with pytest.raises(ValueError, match="rows must be a multiple of the 4 images"):
        live.rows_per_image(201)
