"""quantize_rows on the inputs of out-proj and fc2, against what torch users run instead."""

from typing import Any

import pytest
import torch

from bench.harness import Variant, Work, compare, record
from bench.shapes import TOWERS, Tower
from lraee import ops
from lraee.ops import reference
from tests.support import assert_same

CASES = [(tower, batch, K) for tower in TOWERS for batch in (1, 32) for K in (1, 4)]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("tower", "batch", "widths"), CASES, ids=[f"{t.name}-b{b}-{k}D" for t, b, k in CASES]
)
def bench_quantize_rows(benchmark: Any, tower: Tower, batch: int, widths: int) -> None:
    M, K = batch * tower.L, widths * tower.D
    x = torch.randn(M, K)

    def check() -> None:
        for result, expected in zip(
            ops.quantize_rows(x, symmetric=False), reference.quantize_rows(x, False), strict=True
        ):
            assert_same(result, expected)

    result = compare(
        benchmark,
        check,
        Variant("lraee", lambda: ops.quantize_rows(x, symmetric=False)),
        [
            Variant("torch eager per row", lambda: reference.quantize_rows(x, False)),
            Variant(
                "torch per tensor",
                lambda: torch.quantize_per_tensor_dynamic(x, torch.quint8, False),
            ),
        ],
        budget_s=1.0,
    )
    work = Work(ops=0, size_bytes=M * (K * 5 + 8))
    record(benchmark, f"{tower.name} b{batch}", f"M={M} K={K}", result, work)
