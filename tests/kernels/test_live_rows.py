"""The scope in which launches skip the rows of images that left the tower."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import poisoned
from lraee.kernels import live_rows
from lraee.kernels.configs import SEGMENT_K, RowConfig
from lraee.kernels.float_attention import float_attention
from lraee.kernels.float_linear import float_linear
from lraee.kernels.gated_quantize import gated_quantize
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.quantize_rows import quantize_rows
from tests.support import assert_same

IMAGES, ROWS = 3, 5
SENTINEL = 77


def test_the_scope_ends_with_its_block_and_is_of_its_thread() -> None:
    live = LiveRows(torch.ones(1, dtype=torch.int32), 4)
    elsewhere: list[LiveRows | None] = []
    with live_rows.using(live):
        assert live_rows.current() is live
        thread = threading.Thread(target=lambda: elsewhere.append(live_rows.current()))
        thread.start()
        thread.join()
    assert live_rows.current() is None and elsewhere == [None]


def test_rows_are_shared_out_to_images() -> None:
    live = LiveRows(torch.ones(1, dtype=torch.int32), 4)
    assert live.rows_per_image(200) == 50
    with pytest.raises(ValueError, match="rows must be a multiple of the 4 images"):
        live.rows_per_image(201)


def _launches() -> dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]:
    """Launches on ROWS rows of each of IMAGES images, in programs of one row and of more."""
    M, D = IMAGES * ROWS, 48
    generator = torch.Generator().manual_seed(1)

    def rows(*shape: int) -> Tensor:
        return poisoned(torch.randn(*shape, generator=generator))

    x, wide, gamma = rows(M, D), rows(M, 2 * D), rows(D)
    qkv = rows(IMAGES, ROWS, 3 * D)
    long, w = rows(M, 2 * SEGMENT_K), rows(8, 2 * SEGMENT_K)
    return {
        "float_attention": partial(float_attention, qkv, 3),
        "first queries": partial(float_attention, qkv, 3, num_queries=1),
        "float_linear": partial(float_linear, long, w, splits=1),
        "float_linear in parts": partial(float_linear, long, w, splits=2),
    } | {
        f"{function.__name__} {block_m}": partial(
            function, *given, config=RowConfig(block_m, num_warps=4)
        )
        for function, given in (
            (quantize_rows, (x, False)),
            (layer_norm_quantize, (x, gamma, gamma, 1e-5, False)),
            (gated_quantize, (wide, "silu")),
        )
        for block_m in (1, 4)
    }


LAUNCHES = _launches()


def _tensors(result: Tensor | tuple[Tensor, ...]) -> Iterable[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_leave_the_rows_of_other_images(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = LAUNCHES[name]
    expected = list(_tensors(call()))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(SENTINEL))
    for images in range(IMAGES + 1):
        with live_rows.using(LiveRows(torch.tensor([images], dtype=torch.int32), IMAGES)):
            actual = list(_tensors(call()))
        for value, whole in zip(actual, expected, strict=True):
            first = images * (len(whole) // IMAGES)
            assert_same(value[:first], whole[:first], images=images)
            assert (value[first:] == SENTINEL).all(), images
