"""int8_linear with the epilogue that its layer has, against the same layer in torch.

fc1 carries GELU, out-proj and fc2 a residual, on both sides. The weights of every variant rotate
through as many copies as fill the tower's own weights. torch._int_mm has no epilogue: int32 out.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Variant, Work, compare, copies, record
from bench.shapes import Linear, Tower, linear_batches
from lraee import ops
from lraee.kernels.operands import PackedLinear
from lraee.ops import reference
from tests.support import assert_within

CASES = list(linear_batches())
IDS = [f"{tower.name}-{linear.name}-b{batch}" for tower, linear, batch in CASES]


def _float_layer(linear: Linear, x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
    """The layer as a float tower runs it."""
    y = F.linear(x, w, b)
    if linear.name == "mlp.fc1":
        return F.gelu(y)
    return y if linear.name == "attn.qkv" else y + residual


@pytest.mark.parametrize(("tower", "linear", "batch"), CASES, ids=IDS)
def bench_int8_linear(benchmark: Any, tower: Tower, linear: Linear, batch: int) -> None:
    M, N, K = batch * tower.L, linear.N, linear.K
    x, w, b = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.randn(N)
    residual = torch.randn(M, N)
    w_q, w_scale, _ = ops.quantize_rows(w, symmetric=True)
    x_q, x_scale, x_zero = ops.quantize_rows(x, symmetric=False)
    has_residual = linear.name in ("attn.out", "mlp.fc2")

    def run_int8(w: Tensor, w_sum: Tensor) -> Tensor:
        return ops.int8_linear(
            x_q, x_scale, x_zero, PackedLinear(w, w_scale, w_sum, b),
            residual=residual if has_residual else None,
            activation="gelu" if linear.name == "mlp.fc1" else "none",
        )  # fmt: skip

    def check() -> None:
        plain = PackedLinear(w_q, w_scale, w_q.sum(1, dtype=torch.int32), b)
        product = reference.int8_linear(x_q, x_scale, x_zero, plain)
        if linear.name == "mlp.fc1":
            product = F.gelu(product)
        elif has_residual:
            product = product + residual
        # float32 rounding of the epilogue, and the polynomial of GELU
        assert_within(run_int8(*ops.pack_weight(w_q)), product, 1e-5 * (1.0 + product.abs().max()))

    count = -(-tower.weights // (N * K))
    packed = copies(ops.pack_weight(w_q), count)
    floats = copies((w,), count)
    halves = copies((w.bfloat16(),), count)
    columns = copies((w_q.t(),), count)
    x16, b16, residual16 = x.bfloat16(), b.bfloat16(), residual.bfloat16()
    result = compare(
        benchmark,
        check,
        Variant("lraee", lambda: run_int8(*packed())),
        [
            Variant("torch fp32", lambda: _float_layer(linear, x, floats()[0], b, residual)),
            Variant("torch bf16", lambda: _float_layer(linear, x16, halves()[0], b16, residual16)),
            Variant("torch._int_mm", lambda: torch._int_mm(x_q, columns()[0])),
        ],
        budget_s=2.0,
    )
    work = Work(2 * M * N * K, N * K + M * K + 4 * M * N * (2 if has_residual else 1))
    title = f"{tower.name} {linear.name}"
    record(benchmark, title, f"M={M} N={N} K={K}", result, work)
