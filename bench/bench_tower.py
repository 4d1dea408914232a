"""Whole image towers, pixels to embedding: INT8 against what torch users run today.

All variants share one process and take turns. Weights are random except for lraee-tiny: time does
not depend on them. Correctness first: every embedding must point where float32's points.

    python -m pytest bench/bench_tower.py -k "B/32" --benchmark-json results/tower.json
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lraee
from bench.harness import Variant, Work, compare, record
from bench.shapes import BATCHES, TINY, TOWERS, Tower
from lraee import zoo

BATCH_BUDGET_S = {1: 8.0, 8: 15.0, 32: 30.0}
ORDER = [(tower, batch) for tower in TOWERS for batch in BATCHES]
MIN_COSINE = {"lraee": 0.98, "torch bf16": 0.98, "torch quantize_dynamic": 0.9}
"""Random weights give nearly equal embeddings for all images, so this catches breakage only."""

Run = Callable[[Tensor], Tensor]
_loaded: dict[str, dict[str, Run]] = {}


def load(tower: Tower) -> nn.Module:
    """The float32 model of open_clip; random weights except for lraee-tiny."""
    if tower is TINY:
        return zoo.load(tower.open_clip)[0]
    torch.manual_seed(0)
    model: nn.Module = open_clip.create_model(tower.open_clip)
    return model.eval()


def image_tower(model: nn.Module) -> nn.Module:
    """The part of a CLIP that sees images."""
    assert isinstance(model.visual, nn.Module)
    return model.visual


def variants(tower: Tower) -> dict[str, Run]:
    """Every variant by name, float32 first; only the last tower asked for stays in memory."""
    if tower.name not in _loaded:
        _loaded.clear()
        model = load(tower)
        floats = image_tower(model)
        halves = copy.deepcopy(floats).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.ao.quantization
            dynamic = torch.ao.quantization.quantize_dynamic(
                copy.deepcopy(floats), {nn.Linear}, dtype=torch.qint8
            )
        _loaded[tower.name] = {
            "torch fp32": floats,
            "lraee": image_tower(lraee.accelerate(model)),
            "torch bf16": lambda images: halves(images.bfloat16()),
            "torch quantize_dynamic": dynamic,
        }
    return _loaded[tower.name]


@pytest.mark.parametrize(("tower", "batch"), ORDER, ids=[f"{t.name}-b{b}" for t, b in ORDER])
def bench_tower(benchmark: Any, tower: Tower, batch: int) -> None:
    runs = variants(tower)
    images = torch.randn(batch, 3, tower.image_px, tower.image_px)

    def check() -> None:
        expected = runs["torch fp32"](images)
        for name, bound in MIN_COSINE.items():
            cosine = F.cosine_similarity(runs[name](images).float(), expected).min().item()
            assert cosine > bound, (name, tower.name, cosine)

    def variant(name: str) -> Variant:
        return Variant(name, lambda: runs[name](images))

    result = compare(
        benchmark,
        check,
        variant("lraee"),
        [variant(name) for name in runs if name != "lraee"],
        budget_s=BATCH_BUDGET_S[batch],
    )
    benchmark.extra_info["images_per_s"] = 1e3 * batch / result.ours.median_ms
    record(benchmark, tower.name, f"batch {batch}", result, Work(batch * tower.flops, 0))
