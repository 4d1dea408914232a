"""Calibration for search: after which block the class token runs on alone, and its projections.

Without labels, classes or training: one pass sums moments of tokens, a least-squares problem per
later block gives its keys and values, and a second pass tells at each depth for how many photos the
nearest photo is that of full depth. All images leave at one depth: see docs/notes/exits.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lraee.calibration import risk
from lraee.calibration.collect import Pair, split_images
from lraee.calibration.pipeline import Keep, digest
from lraee.calibration.plans import Goal
from lraee.calibration.targets import nearest
from lraee.calibration.thresholds import NEVER
from lraee.exits.bundle import Exits
from lraee.exits.class_token import ClassTokenHead, ClassTokenWeights, in_proj_of
from lraee.exits.gate import Gate, unit
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.layers.int8_block import Int8Block
from lraee.measurement import machine
from lraee.measurement.neighbours import neighbours
from lraee.model.acceleration import Acceleration
from lraee.storage.stages import Tensors
from lraee.towers import search_exits
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, find_tower, tower_spec
from lraee.towers.flops import PartFlops

SPLITS = {"heads": 0.5, "thresholds": 0.5}
"""Half of the images are fitted on and searched in; the others search, and nothing is fitted on
them."""

FIT_IMAGES = 1024
"""Projections are fitted on so many images, 49 or more tokens each."""

MOST_CANDIDATES = 8
BUDGET = 0.88
_RIDGE = 1e-6


class _Moments:
    """Sums for the affine least-squares map from rows x [n, D] to rows y [n, D]."""

    def __init__(self, D: int, device: torch.device) -> None:
        self.xx = torch.zeros(D + 1, D + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(D + 1, D, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y).double()

    def solution(self) -> tuple[Tensor, Tensor]:
        """M [D, D] and c [D] of y ~ x @ M + c."""
        ridge = _RIDGE * self.xx.trace() / len(self.xx)
        diagonal = ridge * torch.eye(len(self.xx), dtype=torch.float64, device=self.xx.device)
        solved = torch.linalg.solve(self.xx + diagonal, self.xy)
        return solved[:-1], solved[-1]


def choose_candidates(depth: int) -> list[int]:
    """Blocks after which the class token may run on alone, of a tower of so many.

    Raises: ValueError on a tower of fewer than three blocks.
    """
    if depth < 3:
        raise ValueError(f"calibrate: model must have 3 blocks at least for search, got {depth}")
    return list(range(max(1, depth // 2, depth - 1 - MOST_CANDIDATES), depth - 1))


@torch.no_grad()
def fit(pair: Pair, rows: Tensor, candidates: Sequence[int]) -> dict[int, ClassTokenWeights]:
    """Keys and values of the later blocks for an exit after each candidate.

    Args:
      pair: runs the int8 tower.
      rows: bool [n], the images to fit on.
      candidates: depths in blocks, ascending, the last below the tower's less one.
    """
    tower = find_tower(pair.fast)
    blocks = [cast(Int8Block, block) for block in blocks_of(tower)]
    D, E = tower_spec(tower).width, embedding_size(tower)
    later = range(candidates[0] + 1, len(blocks))
    moments: dict[tuple[int, int], _Moments] = {}
    for z in pair.tokens(rows, "fit"):
        for k in later:
            y = _keys_input(blocks[k], z[k])
            for e in (e for e in candidates if e < k):
                sums = moments.setdefault((e, k), _Moments(D, y.device))
                sums.add(_keys_input(blocks[k], z[e]), y)
    result = {}
    for e in candidates:
        pairs = [_projection(blocks[k], *moments[e, k].solution()) for k in later if k > e]
        w, b = (torch.stack(each).float().cpu() for each in zip(*pairs, strict=True))
        result[e] = ClassTokenWeights(w, b, E)
    return result


def _keys_input(block: Int8Block, z: Tensor) -> Tensor:
    """The patch tokens as the block's keys and values see them, [B (L - 1), D]."""
    norm = block.get_submodule(block.block_spec.norm_1.path)
    return cast(Tensor, norm(z[:, 1:])).flatten(0, 1).float()


def _projection(block: Int8Block, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The block's own keys and values of x @ m + c, as w and b of x @ w.T + b."""
    in_proj = in_proj_of(block)
    w = in_proj.weight.double()[in_proj.in_features :]
    b = w @ c
    if in_proj.bias is not None:
        b = b + in_proj.bias.double()[in_proj.in_features :]
    return w @ m.T, b


def heads_of(tower: nn.Module, weights: Mapping[int, ClassTokenWeights]) -> dict[int, Any]:
    """The exits of an accelerated tower, ready to run; their `macs` are known."""
    spec, blocks = tower_spec(tower), list(blocks_of(tower))
    heads = {}
    for e, each in weights.items():
        heads[e] = ClassTokenHead(each)
        heads[e].attach(blocks[e:], tokens=spec.tokens, macs_after=spec.macs_after_blocks)
    return heads


@torch.no_grad()
def continued(pair: Pair, rows: Tensor, weights: Mapping[int, ClassTokenWeights]) -> Tensor:
    """Embeddings float32 [images, len(weights), E] of the marked images that leave at each exit."""
    tower = find_tower(pair.fast)
    heads = heads_of(tower, weights)

    def parts() -> Iterator[Tensor]:
        for z in pair.tokens(rows, "exits"):
            each = [search_exits.run(tower, head, z[e], e)[0] for e, head in heads.items()]
            yield torch.stack(each, dim=1).cpu()

    return torch.cat(list(parts()))


@dataclass(frozen=True)
class Searches:
    """What photos find that search among others, all of them at one depth.

    Args:
      first: int64 [n, m + 1], the row of the nearest photo at each exit, then at full depth.
      is_among: bool [n, m + 1], the nearest photo of full depth is among the first five.
      teacher: int64 [n], what float finds.
    """

    first: Tensor
    is_among: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, embeddings: Mapping[str, Tensor], exits: Tensor, places: Tensor) -> "Searches":
        """Photos not at these places search among those that are.

        Args:
          embeddings: `teacher` and `full`, [n, E].
          exits: [n, m, E].
          places: bool [n].
        """
        columns = [*exits.unbind(1), embeddings["full"]]
        k = min(5, int(places.sum()))
        ranked = [
            neighbours(unit(each[~places].float()), unit(each[places].float()), k)
            for each in columns
        ]
        teacher = embeddings["teacher"]
        first = torch.stack([rows[:, 0] for rows in ranked], dim=1)
        among = torch.stack([(rows == first[:, -1:]).any(1) for rows in ranked], dim=1)
        return cls(first, among, nearest(teacher[~places], teacher[places]))

    @property
    def loss(self) -> Tensor:
        """Float64 [n, m]: 1.0 where the nearest photo is not that of full depth."""
        return (self.first[:, :-1] != self.first[:, -1:]).double()


def calibrate_search(
    pair: Pair, acceleration: Acceleration, goal: Goal, *, seed: int, keep: Keep
) -> Exits:
    """The exits of one calibration for search.

    Args:
      pair: the float and the int8 model, and the images.
      acceleration: how the int8 model was quantized.
      goal: budget: the latest depth within it; epsilon: the earliest at which the nearest photo
        differs from full depth's for at most so many, with probability 1 - delta.
      seed: of the splits.
      keep: where finished stages are kept.
    Raises: NotImplementedError on a tower without them, ValueError on a budget out of reach.
    """
    tower = find_tower(pair.fast)
    search_exits.require_class_token(tower)
    candidates = choose_candidates(len(blocks_of(tower)))
    embeddings = keep("embeddings", pair.embeddings)
    splits = split_images(embeddings, shares=SPLITS, seed=seed)
    learned = splits["heads"].nonzero()[:, 0]
    fitted = torch.zeros_like(splits["heads"])
    fitted[learned[torch.arange(min(FIT_IMAGES, len(learned))) * len(learned)
                   // min(FIT_IMAGES, len(learned))]] = True  # fmt: skip

    def fit_now() -> Tensors:
        heads = fit(pair, fitted, candidates)
        return {f"{e}.{k}": t for e, head in heads.items() for k, t in head.tensors().items()}

    kept, E = keep("projections", fit_now), embedding_size(tower)
    weights = {e: ClassTokenWeights(kept[f"{e}.w"], kept[f"{e}.b"], E) for e in candidates}
    rows = splits["heads"] | splits["thresholds"]
    exits = keep("exits", lambda: {"embedding": continued(pair, rows, weights)})["embedding"]
    used = {name: each[rows] for name, each in embeddings.items()}
    searches = Searches.of(used, exits, splits["heads"][rows])
    parts = PartFlops.as_run(tower)
    costs = [parts.when_leaving([e], [2 * head.macs])[0] / parts.total
             for e, head in heads_of(tower, weights).items()]  # fmt: skip
    chosen, figures = _choose(searches, costs, goal, seed)
    block = None if chosen is None else candidates[chosen]
    blocks, gates = ((), ()) if block is None else ((block,), ((0.0, 0.0, 0.0, 0.0),))
    plan = Plan(blocks, Gate("static", gates, (-NEVER,) * len(blocks)))
    kept_block = candidates[-1] if block is None else block
    return Exits(
        heads={kept_block: weights[kept_block]}, plans={"static": plan}, chosen="static",
        classes=None, logit_scale=1.0, compaction=Compaction(),
        scheme=acceleration.scheme, base_hash=acceleration.base_hash,
        card={
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            **{k: v for k, v in machine.describe().items() if k != "command"},
            "target": "search", "seed": seed, "goal": asdict(goal), "classes": 0, "labels": False,
            "images": {name: int(mask.sum()) for name, mask in splits.items()},
            "teacher_sha256": digest(embeddings["teacher"]),
            "candidates": candidates, "dropped": [], "time": None,
            "plans": {"static": {"gate": "static", "exits": list(blocks), **figures}},
            "depths": _depths(candidates, searches, costs),
        },
    )  # fmt: skip


def _choose(
    searches: Searches, costs: Sequence[float], goal: Goal, seed: int
) -> tuple[int | None, dict[str, Any]]:
    """Which candidate, None for none, and what it did, as JSON."""
    loss, figures = searches.loss, {}
    if goal.epsilon is None:
        affordable = [e for e, cost in enumerate(costs) if cost <= cast(float, goal.budget)]
        if not affordable:
            raise ValueError(
                f"calibrate: budget must be at least {min(costs):.3f} for search, the earliest"
                f" exit's, got {goal.budget}"
            )
        chosen: int | None = affordable[-1]
    else:
        source = torch.Generator().manual_seed(seed + 1)
        shuffled = loss[torch.randperm(len(loss), generator=source)].numpy()
        path = np.concatenate([np.zeros((len(loss), 1)), shuffled[:, ::-1]], axis=1)
        last = risk.learn_then_test(
            path, epsilon=goal.epsilon, delta=goal.delta, bound="hoeffding_bentkus"
        )
        chosen = len(costs) - last if last else None
        figures = {
            "is_certified": last is not None, "epsilon": goal.epsilon, "delta": goal.delta,
            "bound": "hoeffding_bentkus", "loss": float(path[:, last or 0].mean()),
            "images": len(loss), "step": last or 0, "steps": path.shape[1],
        }  # fmt: skip
    column = len(costs) if chosen is None else chosen
    as_float = (searches.first == searches.teacher[:, None]).double().mean(0)
    return chosen, {
        "share": [0.0 if chosen is None else 1.0] * (chosen is not None)
        + [1.0 if chosen is None else 0.0],
        "flops_saved": 0.0 if chosen is None else 1.0 - costs[chosen],
        "gain": float(as_float[column]),
        "gain_at_full_depth": float(as_float[-1]),
        **figures,
    }


def _depths(
    candidates: Sequence[int], searches: Searches, costs: Sequence[float]
) -> list[dict[str, float]]:
    """What leaving after each candidate gives, as JSON."""
    same = 1.0 - searches.loss.mean(0)
    among = searches.is_among.double().mean(0)
    return [
        {
            "block": block, "flops_saved": 1.0 - cost, "nearest": float(same[e]),
            "among_five": float(among[e]),
        }
        for e, (block, cost) in enumerate(zip(candidates, costs, strict=True))
    ]  # fmt: skip
