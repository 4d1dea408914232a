"""layer_norm_quantize on the inputs of qkv and fc1, against LayerNorm in torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Variant, Work, compare, record
from bench.shapes import TOWERS, Tower
from lraee import ops
from lraee.ops import reference
from tests.support import assert_same

CASES = [(tower, batch) for tower in TOWERS for batch in (1, 32)]


@pytest.mark.parametrize(("tower", "batch"), CASES, ids=[f"{t.name}-b{b}" for t, b in CASES])
def bench_layer_norm_quantize(benchmark: Any, tower: Tower, batch: int) -> None:
    M, D = batch * tower.L, tower.D
    x, gamma, beta = torch.randn(M, D), torch.rand(D) + 0.5, torch.randn(D)

    def layer_norm() -> Tensor:
        return F.layer_norm(x, [D], gamma, beta, 1e-5)

    def check() -> None:
        for result, expected in zip(
            ops.layer_norm_quantize(x, gamma, beta, symmetric=False),
            reference.layer_norm_quantize(x, gamma, beta, 1e-5, False),
            strict=True,
        ):
            assert_same(result, expected)

    result = compare(
        benchmark,
        check,
        Variant("lraee", lambda: ops.layer_norm_quantize(x, gamma, beta, symmetric=False)),
        [
            Variant("torch norm alone", layer_norm),
            Variant(
                "torch norm + eager rows", lambda: reference.quantize_rows(layer_norm(), False)
            ),
        ],
        budget_s=1.0,
    )
    work = Work(ops=0, size_bytes=M * (D * 5 + 8))
    record(benchmark, f"{tower.name} b{batch}", f"M={M} D={D}", result, work)
