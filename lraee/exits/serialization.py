"""Saves exits, and loads them again: `exits.json` and one file of tensors, see lraee.sealed."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lraee.exits.gate import Gate
from lraee.exits.head import HeadWeights
from lraee.exits.plan import ExitsData, Plan
from lraee.exits.router import Compaction
from lraee.layers.scheme import SINCE, Scheme
from lraee.storage import sealed
from lraee.storage.files import (
    CheckpointError,
    is_sha256,
    parse_json,
    parse_options,
    refuse,
    refusing,
    require_count,
    require_keys,
    require_list,
    require_number,
)
from lraee.storage.sealed import Format, Shapes

Kind = TypeVar("Kind", bound=ExitsData)

FORMAT = Format(
    name="lraee exits",
    version=1,
    config_name="exits.json",
    prefix="exits",
    saver="Exits.save",
    fields=frozenset(
        {
            "heads", "embedding", "classes", "plans", "chosen", "logit_scale", "copy_share",
            "scheme", "base_hash", "card",
        }
    ),
)  # fmt: skip

_MAX_BLOCKS = 512
_MAX_HEADS = 64
_MAX_PLANS = 256
_MAX_NAME = 64
_MAX_WIDTH = 1 << 16
_MAX_CLASSES = 1 << 24
_MAX_TENSOR_BYTES = 1 << 30
_MAX_CARD_BYTES = 1 << 20
_MAX_CARD_DEPTH = 32
_UNIT_ERROR = 1e-3

_INFINITE = {"inf": math.inf, "-inf": -math.inf}
"""Thresholds that JSON has no number for."""


def save(exits: ExitsData, directory: str | os.PathLike[str]) -> None:
    """See Exits.save."""
    sealed.write(Path(directory), FORMAT, *to_parts(exits))


def load(directory: str | os.PathLike[str], kind: type[Kind]) -> Kind:
    """See Exits.load."""
    config = sealed.read_config(Path(directory), FORMAT)
    shapes = tensor_shapes(config.path, config.fields)
    tensors = sealed.read_tensors(config, shapes, source="the heads and classes")
    return from_parts(config.path, config.fields, tensors, kind)


# Writing


def to_parts(exits: ExitsData) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields for a JSON config and tensors for a file beside it; from_parts is the inverse.

    Raises: ValueError on exits that from_parts would refuse.
    """
    heads = dict(sorted(exits.heads.items()))
    last = next(iter(heads.values()))
    fields = {
        "heads": [{"block": block, **_sizes(head)} for block, head in heads.items()],
        "embedding": (last.b1 if last.b2 is None else last.b2).numel(),
        "classes": None if exits.classes is None else exits.classes.shape[:1].numel(),
        "plans": {name: _plan_fields(plan) for name, plan in exits.plans.items()},
        "chosen": exits.chosen,
        "logit_scale": float(exits.logit_scale),
        "copy_share": float(exits.compaction.copy_share),
        "scheme": asdict(exits.scheme),
        "base_hash": exits.base_hash,
        "card": dict(exits.card),
    }
    tensors = {
        f"heads.{block}.{name}": tensor
        for block, head in heads.items()
        for name, tensor in head.tensors().items()
    }
    if exits.classes is not None:
        tensors["classes"] = exits.classes
    tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
    _require_loadable(fields, tensors)
    return fields, tensors


def _sizes(head: HeadWeights) -> dict[str, int | None]:
    hidden = None if head.w2 is None else head.b1.numel()
    return {"inputs": head.gamma.numel(), "hidden": hidden}


def _plan_fields(plan: Plan) -> dict[str, Any]:
    named = {value: name for name, value in _INFINITE.items()}
    return {
        "blocks": list(plan.blocks),
        "kind": plan.gate.kind,
        "weights": [[float(weight) for weight in row] for row in plan.gate.weights],
        "thresholds": [named.get(value, float(value)) for value in plan.gate.thresholds],
    }


def _copied(tensor: Tensor) -> Tensor:
    """In memory of its own, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _require_loadable(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless these come back from a file."""
    path = Path("exits")
    try:
        try:
            text = json.dumps(fields)
        except (TypeError, ValueError, RecursionError) as error:
            refuse(path, "must be JSON", str(error))
        from_parts(path, parse_json(path, text.encode()), tensors, ExitsData)
    except CheckpointError as error:
        raise ValueError(f"save{str(error).removeprefix('load')}") from error


# Reading


def tensor_shapes(path: Path, fields: Any) -> Shapes:
    """Type and shape of each tensor that belongs to these fields.

    Args:
      path: where the fields were read, for messages.
      fields: from a file; nothing about them is known yet.
    Raises: CheckpointError on any that to_parts does not give.
    """
    require_keys(path, "exits", fields, FORMAT.fields)
    E = require_count(path, "embedding", fields["embedding"], _MAX_WIDTH)
    shapes: dict[str, tuple[int, ...]] = {}
    for block, P, H in _parse_sizes(path, fields["heads"]):
        N = E if H is None else H
        own = {"gamma": (P,), "beta": (P,), "w1": (N, P), "b1": (N,)}
        last = {} if H is None else {"w2": (E, H), "b2": (E,)}
        shapes |= {f"heads.{block}.{name}": shape for name, shape in (own | last).items()}
    if fields["classes"] is not None:
        shapes["classes"] = (require_count(path, "classes", fields["classes"], _MAX_CLASSES), E)
    result: Shapes = {name: (torch.float32, shape) for name, shape in shapes.items()}
    size = sealed.size_bytes(result)
    if size > _MAX_TENSOR_BYTES:
        refuse(path, f"heads and classes must be of at most {_MAX_TENSOR_BYTES} bytes", size)
    return result


def from_parts(path: Path, fields: Any, tensors: Mapping[str, Tensor], kind: type[Kind]) -> Kind:
    """The exits that to_parts took apart.

    Args:
      path: where the fields were read, for messages.
      fields: from a file; nothing about them is known yet.
      tensors: those of tensor_shapes.
      kind: Exits, whose file this is.
    Raises: CheckpointError on any that to_parts does not give.
    """
    _require_tensors(path, tensors, tensor_shapes(path, fields))
    classes = tensors.get("classes")
    if classes is not None:
        _require_unit_rows(path, classes)
    logit_scale = require_number(path, "logit_scale", fields["logit_scale"])
    if logit_scale <= 0:
        refuse(path, "logit_scale must be above 0", logit_scale)
    copy_share = require_number(path, "copy_share", fields["copy_share"])
    if copy_share < 0:
        refuse(path, "copy_share must be at least 0", copy_share)
    if not is_sha256(fields["base_hash"]):
        refuse(path, "base_hash must be 64 hexadecimal digits", fields["base_hash"])
    _require_name(path, "chosen", fields["chosen"])
    _require_card(path, fields["card"])
    with refusing(path):
        return kind(
            heads={head["block"]: _head(tensors, head["block"]) for head in fields["heads"]},
            plans=_parse_plans(path, fields["plans"]),
            chosen=fields["chosen"],
            classes=classes,
            logit_scale=logit_scale,
            compaction=Compaction(copy_share),
            scheme=parse_options(path, "scheme", fields["scheme"], Scheme(), since=SINCE),
            base_hash=fields["base_hash"],
            card=fields["card"],
        )


def _parse_sizes(path: Path, value: Any) -> list[tuple[int, int, int | None]]:
    """Block, P and H (None: one layer) of each head."""
    sizes = []
    for i, head in enumerate(require_list(path, "heads", value, 1, _MAX_HEADS)):
        where = f"heads[{i}]"
        require_keys(path, where, head, ("block", "inputs", "hidden"))
        P = require_count(path, f"{where}.inputs", head["inputs"], _MAX_WIDTH)
        H = head["hidden"]
        if H is not None:
            require_count(path, f"{where}.hidden", H, _MAX_WIDTH)
        sizes.append((head["block"], P, H))
    _require_blocks(path, "heads[].block", [block for block, _, _ in sizes])
    widths = sorted({P for _, P, _ in sizes})
    if not set(widths) <= {widths[0], 2 * widths[0]}:
        refuse(path, "heads[].inputs must be D or 2 D, one D for all", widths)
    return sizes


def _head(tensors: Mapping[str, Tensor], block: int) -> HeadWeights:
    prefix = f"heads.{block}."
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return HeadWeights.of({name.removeprefix(prefix): tensor for name, tensor in own.items()})


def _parse_plans(path: Path, value: Any) -> dict[str, Plan]:
    if type(value) is not dict or not 1 <= len(value) <= _MAX_PLANS:
        refuse(path, f"plans must be an object of 1 to {_MAX_PLANS} plans", value)
    for name in value:
        _require_name(path, "the name of a plan", name)
    return {name: _parse_plan(path, f"plans.{name}", plan) for name, plan in value.items()}


def _parse_plan(path: Path, where: str, value: Any) -> Plan:
    raw = require_keys(path, where, value, ("blocks", "kind", "weights", "thresholds"))
    blocks = _require_blocks(path, f"{where}.blocks", raw["blocks"])
    rows = require_list(path, f"{where}.weights", raw["weights"], 0, _MAX_HEADS)
    thresholds = require_list(path, f"{where}.thresholds", raw["thresholds"], 0, _MAX_HEADS)
    gate = Gate(
        raw["kind"],
        tuple(_parse_weights(path, f"{where}.weights[{i}]", row) for i, row in enumerate(rows)),
        tuple(
            _parse_threshold(path, f"{where}.thresholds[{i}]", threshold)
            for i, threshold in enumerate(thresholds)
        ),
    )
    return Plan(tuple(blocks), gate)


def _parse_weights(path: Path, where: str, value: Any) -> tuple[float, float, float, float]:
    row = require_list(path, where, value, 4, 4)
    w1, w2, w3, constant = (require_number(path, where, weight) for weight in row)
    return w1, w2, w3, constant


def _parse_threshold(path: Path, where: str, value: Any) -> float:
    if type(value) is str and value in _INFINITE:
        return _INFINITE[value]
    number = require_number(path, where, value)
    if torch.tensor(number, dtype=torch.float64).float().item() != number:
        refuse(path, f"{where} must be exact in float32", value)
    return number


def _require_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    if set(tensors) != set(shapes):
        refuse(path, "tensors must be those of the heads and classes", sorted(tensors))
    for name, (dtype, shape) in shapes.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            refuse(path, f"{name} must be {dtype} {list(shape)}", found)
        is_wrong = ~tensor.isfinite()
        if is_wrong.any():
            refuse(path, f"{name} must be finite", tensor[is_wrong][0].item())


def _require_unit_rows(path: Path, classes: Tensor) -> None:
    lengths = classes.double().norm(dim=1)
    wrong = ((lengths - 1).abs() > _UNIT_ERROR).nonzero()[:, 0].tolist()
    if wrong:
        rule = f"classes[{wrong[0]}] must have length 1"
        refuse(path, rule, lengths[wrong[0]].item())


def _require_blocks(path: Path, where: str, value: Any) -> list[int]:
    blocks = require_list(path, where, value, 0, _MAX_HEADS)
    for block in blocks:
        require_count(path, where, block, _MAX_BLOCKS)
    if blocks != sorted(set(blocks)):
        refuse(path, f"{where} must ascend", value)
    return blocks


def _require_name(path: Path, where: str, value: Any) -> None:
    is_name = type(value) is str and value.isascii() and value.isprintable()
    if not is_name or not 1 <= len(value) <= _MAX_NAME:
        refuse(path, f"{where} must be 1 to {_MAX_NAME} printable ASCII characters", value)


def _require_card(path: Path, card: Any) -> None:
    if type(card) is not dict:
        refuse(path, "card must be an object", card)
    if not _is_flat(card, _MAX_CARD_DEPTH):
        refuse(path, f"card must be at most {_MAX_CARD_DEPTH} levels deep", "more")
    try:
        size = len(sealed.render(card))
    except ValueError:
        refuse(path, "card must hold finite numbers", "NaN or Inf")
    if size > _MAX_CARD_BYTES:
        refuse(path, f"card must be of at most {_MAX_CARD_BYTES} bytes", size)


def _is_flat(value: Any, depth: int) -> bool:
    """Whether it nests at most so deep."""
    if type(value) not in (dict, list):
        return True
    inside = value.values() if type(value) is dict else value
    return depth > 0 and all(_is_flat(part, depth - 1) for part in inside)
