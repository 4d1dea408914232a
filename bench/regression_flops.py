"""FLOPs of the three towers: golden integers, torch's counter and our own formulas must agree.

Rounded: 8.8176, 35.1269 and 162.0255 GFLOP an image (two for each multiply-add). Accelerated, a
tower leaves out what the class token does not need in the last block: 6.0, 6.3 and 3.1 %.
"""

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lraee
from bench.shapes import B16, B32, L14, Tower
from lraee.towers.flops import PartFlops

GOLDEN = {B32: 8_817_623_040, B16: 35_126_906_880, L14: 162_025_537_536}
GOLDEN_AS_RUN = {B32: 8_289_871_872, B16: 32_927_391_744, L14: 156_924_215_296}
QUANTIZED = {"lraee.int8_block"}  # its linears and its attention

towers = pytest.mark.parametrize("tower", GOLDEN, ids=lambda tower: tower.name)


def _images(tower: Tower, batch: int, device: str) -> torch.Tensor:
    return torch.zeros(batch, 3, tower.image_px, tower.image_px, device=device)


def _count(visual: torch.nn.Module, images: torch.Tensor) -> dict[str, int]:
    """FLOPs by operator. On the meta device torch counts attention, which it skips on the CPU."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        visual(images)
    return {str(op): int(flops) for op, flops in counter.get_flop_counts()["Global"].items()}


@towers
def test_formula_is_golden(tower: Tower) -> None:
    assert tower.flops == GOLDEN[tower]


@towers
def test_float_tower_counts_golden(tower: Tower) -> None:
    model = open_clip.create_model(tower.open_clip, device="meta").eval()
    counts = _count(model.visual, _images(tower, 2, "meta"))
    assert sum(counts.values()) == 2 * GOLDEN[tower], counts


@towers
def test_int8_tower_counts_golden(tower: Tower) -> None:
    """Nothing is computed twice and nothing is missing; more than 97 % of it in int8."""
    model = open_clip.create_model(tower.open_clip).eval()
    fast = lraee.accelerate(model, inplace=True)
    counts = _count(fast.visual, _images(tower, 2, "cpu"))
    assert sum(counts.values()) == 2 * GOLDEN_AS_RUN[tower], counts
    assert PartFlops.as_run(fast.visual).total == GOLDEN_AS_RUN[tower]
    share = sum(counts[op] for op in QUANTIZED) / sum(counts.values())
    assert share > 0.97, counts
    fast.visual.transformer.register_forward_hook(lambda *_: None)  # someone asks for all tokens
    counts = _count(fast.visual, _images(tower, 1, "cpu"))
    assert sum(counts.values()) == GOLDEN[tower], counts
