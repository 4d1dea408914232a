"""The format of saved exits, and the way from Exits to its files and back: see storage.sealed."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from lraee.exits.class_token import ClassTokenWeights
from lraee.exits.gate import Gate, GateKind
from lraee.exits.head import HeadWeights
from lraee.exits.plan import ExitsData, Plan
from lraee.exits.router import Compaction
from lraee.layers.scheme import SINCE, Scheme
from lraee.storage import schema, sealed
from lraee.storage.files import require
from lraee.storage.schema import Spec, Specs, integer, items, nullable, real, record, sized

_MAX_HEADS = 64
_MAX_TENSOR_BYTES = 1 << 30
_INFINITE = ("inf", "-inf")  # thresholds that JSON has no number for


_WIDTH = integer(1, 1 << 16)
_BLOCK = integer(1, 512)
_THRESHOLD = schema.scalar(
    "a finite float32 number, 'inf' or '-inf'",
    lambda v: (
        v in _INFINITE if type(v) is str else type(v) is float and abs(v) <= schema.MAX_FLOAT32
    ),
    build=float,
)
SCHEME = schema.options(Scheme(), SINCE)
_HEAD = record({"block": _BLOCK, "inputs": _WIDTH, "hidden": nullable(_WIDTH)})
_CLASS_TOKEN = record({"block": _BLOCK, "projections": integer(1, 512), "width": _WIDTH})
_PLAN = record(
    {
        "blocks": items(_BLOCK, 0, _MAX_HEADS),
        "kind": schema.choice(*get_args(GateKind)),
        "weights": items(items(real(), 4, 4), 0, _MAX_HEADS),
        "thresholds": items(_THRESHOLD, 0, _MAX_HEADS),
    },
    build=lambda blocks, kind, weights, thresholds: Plan(blocks, Gate(kind, weights, thresholds)),
)
FIELDS: dict[str, schema.Kind] = {
    "heads": items(_HEAD, 1, _MAX_HEADS),
    "class_tokens": items(_CLASS_TOKEN, 0, _MAX_HEADS),
    "embedding": _WIDTH,
    "classes": nullable(integer(1, 1 << 24)),
    "plans": schema.table(_PLAN, 1, 256),
    "chosen": schema.NAME,
    "logit_scale": real(above=0.0),
    "copy_share": real(0.0),
    "scheme": SCHEME,
    "base_hash": schema.DIGEST,
    "card": schema.free(size_bytes=1 << 20, levels=32),
}
FIELDS_SINCE: dict[str, Any] = {"class_tokens": []}
"""Fields that older files lack; they are not written where they say nothing."""
FORMAT = sealed.Format("lraee exits", 1, "exits.json", "exits", "Exits.save", FIELDS, FIELDS_SINCE)

_LAYER = {name: Spec(torch.float32, sizes) for name, sizes in
          (("gamma", "P"), ("beta", "P"), ("w1", "NP"), ("b1", "N"))}  # fmt: skip
_LAST = {"w2": Spec(torch.float32, "EN"), "b2": Spec(torch.float32, "E")}
_PROJECTIONS = {"w": Spec(torch.float32, "RND"), "b": Spec(torch.float32, "RN")}
_CLASSES = {"classes": Spec(torch.float32, "KE", "rows of length 1")}


Kind = TypeVar("Kind", bound=ExitsData)


def save(exits: ExitsData, directory: str | os.PathLike[str]) -> None:
    """See Exits.save."""
    sealed.write(Path(directory), FORMAT, *to_parts(exits), tensor_specs)


def load(directory: str | os.PathLike[str], kind: type[Kind]) -> Kind:
    """See Exits.load."""
    with sealed.opened(Path(directory), FORMAT) as saved:
        with saved.refusing():
            specs = tensor_specs(saved.fields)
        tensors = saved.tensors(specs)
        with saved.refusing():
            return from_parts(saved.fields, tensors, kind)


def to_parts(exits: ExitsData) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields for a JSON config and tensors for a file beside it; from_parts is the inverse."""
    every = dict(sorted(exits.heads.items()))
    alone = {b: head for b, head in every.items() if isinstance(head, ClassTokenWeights)}
    fields = {
        "heads": [{"block": block, **_sizes(head)} for block, head in every.items()],
        "embedding": next(iter(every.values())).embedding_size,
        "classes": None if exits.classes is None else exits.classes.shape[:1].numel(),
        "plans": {name: _plan_fields(plan) for name, plan in exits.plans.items()},
        "chosen": exits.chosen,
        "logit_scale": float(exits.logit_scale),
        "copy_share": float(exits.compaction.copy_share),
        "scheme": exits.scheme.fields,
        "base_hash": exits.base_hash,
        "card": dict(exits.card),
    }
    if alone:
        fields["class_tokens"] = [
            {"block": block, "projections": len(head.w), "width": head.w.shape[2]}
            for block, head in alone.items()
        ]
    tensors = {
        f"heads.{block}.{name}": tensor
        for block, head in every.items()
        for name, tensor in head.tensors().items()
    }
    if exits.classes is not None:
        tensors["classes"] = exits.classes
    return fields, {name: sealed.own_copy(tensor) for name, tensor in tensors.items()}


def _sizes(head: HeadWeights | ClassTokenWeights) -> dict[str, int | None]:
    if isinstance(head, ClassTokenWeights):
        return {"inputs": head.w.shape[2], "hidden": None}
    hidden = None if head.w2 is None else head.b1.numel()
    return {"inputs": head.gamma.numel(), "hidden": hidden}


def _plan_fields(plan: Plan) -> dict[str, Any]:
    gate = plan.gate
    return {
        "blocks": list(plan.blocks),
        "kind": gate.kind,
        "weights": [[float(weight) for weight in row] for row in gate.weights],
        "thresholds": [str(v) if math.isinf(v) else float(v) for v in gate.thresholds],
    }


def tensor_specs(fields: Mapping[str, Any]) -> Specs:
    """What the tensors of these checked fields must be.

    Raises: Violation where the sizes of the heads do not fit each other.
    """
    heads, alone, E = fields["heads"], fields["class_tokens"], fields["embedding"]
    for name, group in (("heads", heads), ("class_tokens", alone)):
        blocks = [head["block"] for head in group]
        require(blocks == sorted(set(blocks)), f"{name}[].block must ascend", blocks)
    unknown = sorted({head["block"] for head in alone} - {head["block"] for head in heads})
    require(not unknown, "class_tokens[].block must be one of heads", unknown)
    heads = [h for h in heads if h["block"] not in {head["block"] for head in alone}]
    widths = {head["inputs"] for head in heads}
    D = min(widths, default=1)
    require(widths <= {D, 2 * D}, "heads[].inputs must be D or 2 D, one D for all", sorted(widths))
    specs: Specs = {}
    for head in heads:
        declared = _LAYER if head["hidden"] is None else _LAYER | _LAST
        sizes = {"P": head["inputs"], "N": head["hidden"] or E, "E": E}
        specs |= sized(f"heads.{head['block']}.", declared, sizes)
    for head in alone:
        R, D = head["projections"], head["width"]
        sizes = {"R": R, "N": 2 * D, "D": D}
        specs |= sized(f"heads.{head['block']}.", _PROJECTIONS, sizes)
    if fields["classes"] is not None:
        specs |= sized("", _CLASSES, {"K": fields["classes"], "E": E})
    size = sum(spec.size_bytes for spec in specs.values())
    rule = f"heads and classes must be of at most {_MAX_TENSOR_BYTES} bytes"
    require(size <= _MAX_TENSOR_BYTES, rule, size)
    return specs


def from_parts(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: type[Kind]) -> Kind:
    """The exits that to_parts took apart, from checked fields and tensors.

    Raises: ValueError where they do not fit each other.
    """
    alone = {head["block"] for head in fields["class_tokens"]}
    heads: dict[int, dict[str, Tensor]] = {head["block"]: {} for head in fields["heads"]}
    for name in sorted(tensors.keys() - {"classes"}):
        _, block, own = name.split(".")
        heads[int(block)][own] = tensors[name]
    return kind(
        heads={
            block: ClassTokenWeights(**own, embedding_size=fields["embedding"])
            if block in alone
            else HeadWeights.of(own)
            for block, own in heads.items()
        },
        classes=tensors.get("classes"),
        compaction=Compaction(fields["copy_share"]),
        **{name: fields[name] for name in _SAME},
    )


_SAME = ("plans", "chosen", "logit_scale", "scheme", "base_hash", "card")
"""Fields that are called alike in Exits."""
