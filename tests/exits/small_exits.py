"""Exits of no tower: small, with awkward numbers, for tests of files."""

import math
from typing import Any

import torch

from lraee.exits.bundle import Exits
from lraee.exits.gate import Gate, GateKind
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.layers.scheme import Scheme
from tests.exits.random_exits import make_head
from tests.support import generator

D, E = 8, 6


def small_exits(kind: GateKind = "learned", *, classes: int | None = 5, seed: int = 0) -> Exits:
    """Three heads, one of each form, and two plans."""
    heads = {
        block: make_head(D, E, hidden=hidden, has_class_token=both, seed=seed + block)
        for block, hidden, both in ((11, 4, True), (2, None, False), (5, 3, False))
    }
    blocks = (5,) if kind == "static" else (2, 5, 11)
    thresholds = (math.inf, -math.inf, float(torch.tensor(0.1)))[-len(blocks) :]
    gate = Gate(kind, ((0.1, -0.0, 1e-30, 3.0),) * len(blocks), thresholds)
    last = Gate(kind, ((0.0,) * 4,), (0.5,))
    texts = torch.randn(classes or 1, E, generator=generator(seed))
    return Exits(
        heads=heads,
        plans={"b = 0.5": Plan(blocks, gate), "all": Plan((11,), last)},
        chosen="b = 0.5",
        classes=None if classes is None else torch.nn.functional.normalize(texts, dim=1),
        logit_scale=100.0 / 3,
        compaction=Compaction(copy_share=0.0),
        scheme=Scheme(symmetric=("c_fc",), clip_weights=True, keep_float=("resblocks.0.x",)),
        base_hash="0123456789abcdef" * 4,
        card={"é\n\ud800": [1, 2.5, None, True, {"deep": [[]]}], "": {}},
    )


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value
