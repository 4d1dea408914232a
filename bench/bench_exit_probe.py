"""exit_probe with a two-layer head and 1,000 classes, against the same steps in torch float32."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Variant, Work, compare, record
from bench.shapes import Tower, tower_batches
from lraee import ops, reference
from tests.support import assert_same, assert_within

CASES = [(tower, batch) for tower, batch in tower_batches() if batch != 8]
NUM_CLASSES = 1000
LOGIT_SCALE = 30.0


def _float_probe(
    z: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, w2: Tensor, classes: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, class and score, as one would write them in torch."""
    patches = z[:, 1:]
    h = F.layer_norm(patches.mean(1), gamma.shape, gamma, beta, 1e-5)
    embedding = F.linear(F.gelu(F.linear(h, w1)), w2)
    p = torch.softmax(LOGIT_SCALE * F.normalize(embedding, dim=-1) @ classes.T, dim=-1)
    top = p.topk(2, dim=-1)
    variance = patches.var(1, correction=0).sum(-1)
    margin = top.values[:, 0] - top.values[:, 1]
    score = torch.stack([top.values[:, 0], margin, variance, torch.ones_like(margin)], 1) @ gate
    return embedding, top.indices[:, 0], torch.sigmoid(score)


@pytest.mark.parametrize(("tower", "batch"), CASES, ids=[f"{t.name}-b{b}" for t, b in CASES])
def bench_exit_probe(benchmark: Any, tower: Tower, batch: int) -> None:
    L, D, E = tower.L, tower.D, tower.E
    z, gamma, beta = torch.randn(batch, L, D), torch.rand(D) + 0.5, torch.randn(D)
    w1, w2 = torch.randn(D, D) / math.sqrt(D), torch.randn(E, D) / math.sqrt(D)
    classes = F.normalize(torch.randn(NUM_CLASSES, E), dim=-1)
    gate = torch.tensor([1.0, 1.0, 1.0 / D, -1.0])
    w1_q, w1_scale, _ = ops.quantize_rows(w1, symmetric=True)
    w2_q, w2_scale, _ = ops.quantize_rows(w2, symmetric=True)
    (w1_p, w1_sum), (w2_p, w2_sum) = ops.pack_weight(w1_q), ops.pack_weight(w2_q)

    def run() -> tuple[Tensor, ...]:
        return ops.exit_probe(
            z, gamma, beta, w1_p, w1_scale, w1_sum, None, w2_p, w2_scale, w2_sum, None,
            classes, gate, logit_scale=LOGIT_SCALE,
        )  # fmt: skip

    def check() -> None:
        found = run()
        expected = reference.exit_probe(
            z, gamma, beta, 1e-5, w1_q, w1_scale, w1_sum, None, w2_q, w2_scale, w2_sum, None,
            classes, LOGIT_SCALE, gate,
        )  # fmt: skip
        # One step of the hidden layer may round the other way after GELU's polynomial.
        assert_within(found[0], expected[0], 0.02 * float(expected[0].abs().max()))
        assert_same(found[4], expected[4])

    result = compare(
        benchmark,
        check,
        Variant("lraee", run),
        [Variant("torch fp32", lambda: _float_probe(z, gamma, beta, w1, w2, classes, gate))],
        budget_s=1.5,
    )
    work = Work(
        2 * batch * (D * D + D * E + NUM_CLASSES * E),
        4 * batch * L * D + D * D + D * E + 4 * NUM_CLASSES * E,
    )
    record(benchmark, f"{tower.name} b{batch}", f"B={batch} L={L} D={D} E={E}", result, work)
