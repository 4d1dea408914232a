"""int8_attention on the packed projection, against torch's scaled_dot_product_attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Variant, Work, compare, record
from bench.shapes import Tower, tower_batches
from lraee import ops
from lraee.ops import reference
from tests.support import assert_within

CASES = [(tower, batch) for tower, batch in tower_batches() if batch != 8]


def _float_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Split, attend, join: what a float tower runs between its two projections."""
    B, L, D3 = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D3 // 3)


@pytest.mark.parametrize(("tower", "batch"), CASES, ids=[f"{t.name}-b{b}" for t, b in CASES])
def bench_int8_attention(benchmark: Any, tower: Tower, batch: int) -> None:
    L, D, num_heads = tower.L, tower.D, tower.num_heads
    qkv = torch.randn(batch, L, 3 * D)
    qkv16 = qkv.bfloat16()

    def check() -> None:
        image = qkv[:1]
        expected = reference.int8_attention(image, num_heads)
        # exp and the sum over L of float32 probabilities times values below 6 sigma
        assert_within(ops.int8_attention(image, num_heads=num_heads), expected, L * 2.0**-22 * 6)

    result = compare(
        benchmark,
        check,
        Variant("lraee", lambda: ops.int8_attention(qkv, num_heads=num_heads)),
        [
            Variant("torch fp32", lambda: _float_attention(qkv, num_heads)),
            Variant("torch bf16", lambda: _float_attention(qkv16, num_heads)),
        ],
        budget_s=1.5,
    )
    work = Work(4 * batch * L * L * D, 4 * batch * L * 4 * D)
    record(
        benchmark, f"{tower.name} b{batch}", f"B={batch} L={L} D={D} H={num_heads}", result, work
    )
