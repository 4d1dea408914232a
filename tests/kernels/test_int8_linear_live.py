"""int8_linear inside a scope of live rows: their bits stay, the others are not touched."""

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned_all
from lraee.diagnostics.selftest_inputs import linear
from lraee.kernels import configs, live_rows, workspace
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.live_rows import LiveRows
from tests.support import assert_same

TINY = Config(16, 16, 32, num_warps=4, num_stages=3, group_m=2)
WIDE = Config(32, 64, 64, num_warps=4, num_stages=3)
SPLIT = Config(16, 32, 32, num_warps=4, num_stages=3, split_k=3)
CASES = [(1, 1), (3, 5), (3, 23)]
"""Images and rows of each: tiles that are live in part, wholly, and not."""

each_config = pytest.mark.parametrize("config", [TINY, WIDE, SPLIT], ids=["tiny", "wide", "split"])


def is_poison(rows: Tensor) -> bool:
    return bool((rows.isnan() if rows.is_floating_point() else rows == POISONS[rows.dtype]).all())


POISONS = {torch.int8: 93, torch.int32: 1 << 30}


@each_config
@pytest.mark.parametrize("quantizes", [False, True])
def test_rows_of_live_images_keep_their_bits(config: Config, quantizes: bool) -> None:
    for seed, (capacity, length) in enumerate(CASES):
        given = linear(capacity * length, 18 + seed, 40 + 17 * seed, seed)
        launcher = int8_linear
        if quantizes:
            launcher, given = int8_linear_quantized, given | {"symmetric": seed % 2 == 0}  # type: ignore[assignment]
        whole = launcher(**given, config=config)
        for images in range(capacity + 1):
            live = LiveRows(torch.tensor([images], dtype=torch.int32), capacity)
            with guarded_outputs(), live_rows.using(live):
                part = launcher(**poisoned_all(given), config=config)
            if isinstance(part, Tensor):
                whole, part = (whole,), (part,)
            rows = images * length
            for expected, actual in zip(whole, part, strict=True):
                parameters = {"seed": seed, "images": images, "length": length}
                assert_same(actual[:rows], expected[:rows], **parameters)
                assert is_poison(actual[rows:]), parameters
            whole = whole if quantizes else whole[0]
        assert not workspace.of_current_stream(torch.device("cpu")).tickets.any()


def test_pieces_of_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of which one row is live quantizes that one."""
    monkeypatch.setattr(configs, "PIECE_VALUES", 1)
    monkeypatch.setattr(configs, "MOST_SPREAD_ROWS", 0)
    given = linear(60, 12, 40, 3) | {"symmetric": False, "config": TINY}
    whole = int8_linear_quantized(**given)
    for images in (0, 5, 20):
        live = LiveRows(torch.tensor([images], dtype=torch.int32), 20)
        with guarded_outputs(), live_rows.using(live):
            part = int8_linear_quantized(**given)
        for expected, actual in zip(whole, part, strict=True):
            assert_same(actual[: 3 * images], expected[: 3 * images], images=images)
            assert is_poison(actual[3 * images :]), images


def test_what_is_not_live_is_not_read() -> None:
    """A scale that is not finite, of a row that is not live, changes nothing."""
    given = linear(12, 20, 40, 7) | {"config": TINY}
    whole = int8_linear(**given)
    given["x_scale"][8:] = torch.nan
    with live_rows.using(LiveRows(torch.tensor([2], dtype=torch.int32), 3)):
        assert_same(int8_linear(**given)[:8], whole[:8])


def test_rows_must_be_those_of_the_images() -> None:
    live = LiveRows(torch.tensor([1], dtype=torch.int32), 5)
    with live_rows.using(live), pytest.raises(ValueError, match="multiple of the 5 images"):
        int8_linear(**linear(12, 8, 16, 0))
