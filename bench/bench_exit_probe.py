"""exit_probe with a two-layer head and 1,000 classes, against the same steps in torch float32.

Two heads: the paper's, D -> D -> E on the patch mean, and 2 D -> 512 -> E on the patch mean and the
class token. The last benchmark sets the second beside the INT8 tower that it lets an image leave:

    python -m pytest bench/bench_exit_probe.py -k share
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lraee
from bench.harness import Variant, Work, compare, record
from bench.shapes import B32, TINY, Tower, tower_batches
from lraee import ops, zoo
from lraee.exits.head import contrasts
from lraee.kernels.operands import Norm, PackedLinear, ProbeHead
from lraee.ops import reference
from tests.support import assert_same, assert_within

CASES = [(tower, batch) for tower, batch in tower_batches() if batch != 8]
NUM_CLASSES = 1000
LOGIT_SCALE = 30.0
HIDDEN = 512
"""Hidden values of the head that sees the class token."""


class Head(NamedTuple):
    """A float head, its gate and the classes."""

    gamma: Tensor
    beta: Tensor
    w1: Tensor
    w2: Tensor
    classes: Tensor
    gate: Tensor


def random_head(tower: Tower, *, has_class_token: bool) -> Head:
    """Random weights: time does not depend on them."""
    D, E = tower.D, tower.E
    P, H = (2 * D, HIDDEN) if has_class_token else (D, D)
    return Head(
        torch.rand(P) + 0.5,
        torch.randn(P),
        torch.randn(H, P) / math.sqrt(P),
        torch.randn(E, H) / math.sqrt(H),
        F.normalize(torch.randn(NUM_CLASSES, E), dim=-1),
        torch.tensor([1.0, 1.0, 1.0 / D, -1.0]),
    )


def float_probe(z: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, class and score, as one would write them in torch."""
    patches = z[:, 1:]
    mean = patches.mean(1)
    recorded = mean if head.gamma.numel() == z.shape[2] else torch.cat([mean, z[:, 0]], 1)
    h = F.layer_norm(recorded, head.gamma.shape, head.gamma, head.beta, 1e-5)
    embedding = F.linear(F.gelu(F.linear(h, head.w1)), head.w2)
    p = torch.softmax(LOGIT_SCALE * F.normalize(embedding, dim=-1) @ head.classes.T, dim=-1)
    top = p.topk(2, dim=-1)
    variance = patches.var(1, correction=0).sum(-1)
    margin = top.values[:, 0] - top.values[:, 1]
    features = torch.stack([top.values[:, 0], margin, variance, torch.ones_like(margin)], 1)
    return embedding, top.indices[:, 0], torch.sigmoid(features @ head.gate)


def int8_layer(w: Tensor, pack: Callable[[Tensor], tuple[Tensor, Tensor]]) -> PackedLinear:
    """A weight as `pack` lays it out; no bias."""
    w_q, w_scale, _ = ops.quantize_rows(w, symmetric=True)
    packed, w_sum = pack(w_q)
    return PackedLinear(packed, w_scale, w_sum)


def int8_head(head: Head, pack: Callable[[Tensor], tuple[Tensor, Tensor]]) -> ProbeHead:
    """The operands of exit_probe."""
    layers = int8_layer(head.w1, pack), int8_layer(head.w2, pack)
    norm = Norm(head.gamma, head.beta)
    return ProbeHead(norm, *layers, contrasts(head.classes), LOGIT_SCALE, head.gate)


def int8_probe(z: Tensor, head: Head) -> Callable[[], tuple[Tensor, ...]]:
    """The operator on this head."""
    operands = int8_head(head, ops.pack_weight)
    return lambda: ops.exit_probe(z, operands)


def check_probe(actual: tuple[Tensor, ...], z: Tensor, head: Head) -> None:
    """Raises unless the operator agrees with its definition."""
    expected = reference.exit_probe(z, int8_head(head, reference.pack_weight))
    # One step of the hidden layer may round the other way after GELU's polynomial.
    assert_within(actual[0], expected[0], 0.02 * float(expected[0].abs().max()))
    assert_same(actual[4], expected[4])


@pytest.mark.parametrize("has_class_token", [False, True], ids=["mean", "class-token"])
@pytest.mark.parametrize(("tower", "batch"), CASES, ids=[f"{t.name}-b{b}" for t, b in CASES])
def bench_exit_probe(benchmark: Any, tower: Tower, batch: int, has_class_token: bool) -> None:
    z = torch.randn(batch, tower.L, tower.D)
    head = random_head(tower, has_class_token=has_class_token)
    run = int8_probe(z, head)
    result = compare(
        benchmark,
        lambda: check_probe(run(), z, head),
        Variant("lraee", run),
        [Variant("torch fp32", lambda: float_probe(z, head))],
        budget_s=1.5,
    )
    (H, P), (K, E) = head.w1.shape, head.classes.shape
    work = Work(
        2 * batch * (P * H + H * E + K * E),
        4 * batch * tower.L * tower.D + P * H + H * E + 2 * K * E,
    )
    record(benchmark, f"{tower.name} b{batch}", f"L={tower.L} P={P} H={H} E={E}", result, work)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("tower", [B32, TINY], ids=lambda tower: tower.name)
def bench_share_of_tower(benchmark: Any, tower: Tower, batch: int) -> None:
    """How many probes take as long as the tower: 67 or more keep one below 1.5 %.

    They take turns, so a probe finds its weights as cold as an image does.
    """
    model = (
        zoo.load(tower.open_clip)[0] if tower is TINY else open_clip.create_model(tower.open_clip)
    )
    visual: Any = lraee.accelerate(model.eval()).visual
    images = torch.randn(batch, 3, tower.image_px, tower.image_px)
    z = torch.randn(batch, tower.L, tower.D)
    head = random_head(tower, has_class_token=True)
    run = int8_probe(z, head)
    result = compare(
        benchmark,
        lambda: check_probe(run(), z, head),
        Variant("lraee", run),
        [Variant("int8 tower", lambda: visual(images))],
    )
    record(benchmark, f"{tower.name} b{batch}", "one probe of its tower", result)
