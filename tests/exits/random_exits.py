"""Exits with random heads for any small model, their thresholds set so that images spread out."""

import math
from dataclasses import replace

import torch
from torch import nn

from lraee.exits.bundle import Exits
from lraee.exits.gate import CLASS_FREE, Gate, GateKind
from lraee.exits.head import HeadWeights
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.layers.scheme import INT8, Scheme
from lraee.model.accelerate import accelerate
from lraee.model.trace import trace
from lraee.towers.calls import embedding_size
from lraee.towers.families import encode_image, find_tower, tower_spec
from lraee.towers.state import tower_hash
from tests.support import generator


def make_head(
    D: int, E: int, *, hidden: int | None, has_class_token: bool, seed: int
) -> HeadWeights:
    source = generator(seed)
    P = 2 * D if has_class_token else D
    N = E if hidden is None else hidden

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source) / shape[-1] ** 0.5

    last = {} if hidden is None else {"w2": normal(E, N), "b2": normal(E) * 0.1}
    return HeadWeights(
        torch.rand(P, generator=source) + 0.5, normal(P), normal(N, P), normal(N), **last
    )


def make_exits(
    model: nn.Module,
    *,
    kind: GateKind = "learned",
    blocks: tuple[int, ...] = (1, 2),
    scheme: Scheme = INT8,
    num_classes: int = 7,
) -> Exits:
    """Exits of a float model that few, some and more images take, by depth."""
    tower = find_tower(model)
    spec, E = tower_spec(tower), embedding_size(tower)
    heads = {
        block: make_head(
            spec.width,
            E,
            hidden=None if block % 2 else spec.width // 2,
            has_class_token=block % 3 != 0 and spec.prefix_tokens > 0,
            seed=block,
        )
        for block in blocks
    }
    if kind == "patience":
        num_classes = 2  # random heads seldom agree on one of many
    classes = torch.nn.functional.normalize(
        torch.randn(num_classes, E, generator=generator(99)), dim=1
    )
    if kind == "static":
        blocks = blocks[:1]
    weights = {"learned": (2.0, 3.0, -0.01, -0.6), "agreement": (3.0, 0.0, 0.01, 0.0)}
    row = weights.get(kind, (0.0, 0.0, 0.0, 0.0))
    gate = Gate(kind, (row,) * len(blocks), _open_thresholds(kind, len(blocks)))
    exits = Exits(
        heads={block: heads[block] for block in blocks},
        plans={kind: Plan(blocks, gate)},
        chosen=kind,
        classes=None if kind in CLASS_FREE else classes,
        logit_scale=20.0,
        compaction=Compaction(),
        scheme=scheme,
        base_hash=tower_hash(tower.state_dict()),
        card={"made": "by a test"},
    )
    return exits if kind in ("static", "patience") else _spread(model, exits)


def _open_thresholds(kind: GateKind, count: int) -> tuple[float, ...]:
    return {"patience": (1.0,) * count, "static": (-math.inf,)}.get(kind, (math.inf,) * count)


@torch.no_grad()
def _spread(model: nn.Module, exits: Exits) -> Exits:
    """Thresholds at which about a third of the images that come to an exit leave there."""
    fast = accelerate(model, exits=exits)
    size = tower_spec(find_tower(model)).image_size
    coarse = torch.randn(32, 3, 7, 7, generator=generator(5))
    with trace(fast) as t:
        encode_image(fast, torch.nn.functional.interpolate(coarse, size=size, mode="bicubic"))
    thresholds = []
    for column in t.scores.T:
        finite = column[column.isfinite()]
        thresholds.append(float(finite.quantile(0.67)) if len(finite) else math.inf)
    gate = replace(exits.plan.gate, thresholds=tuple(thresholds))
    return replace(exits, plans={exits.chosen: Plan(exits.plan.blocks, gate)})
