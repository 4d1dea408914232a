"""restore: an accelerated model to the float one that it was made of."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.layers.modules import carry_hooks
from lraee.model.acceleration import (
    Acceleration,
    acceleration_of,
    copier,
    image_tower,
    mark_float,
    replaced_parts,
    replaced_paths,
    weight_dtypes,
)
from lraee.model.text import base_weights
from lraee.towers import runner
from lraee.towers.families import family_of, find_tower, tower_spec
from lraee.towers.state import tower_hash
from lraee.towers.text import TextTower, find_text

Model = TypeVar("Model", bound=nn.Module)


def restore(model: Model, base: nn.Module | Mapping[str, Tensor] | None = None) -> Model:
    """The float model again: image and text tower as they were before accelerate, bit for bit.

    The fast model holds no float weights. They come from the original model, if it is still alive
    and was not changed, or from `base`. All that accelerate copied (a float text tower, logit
    scale) is copied from the fast model. Where the fast model was cast since, the towers are cast
    likewise.

    Args:
      model: an accelerated model; it stays as it is.
      base: the original model, or its state dict.
    Returns: a new float model.
    Raises: ValueError if model is float, or if the weights are not those that accelerate saw;
      LookupError if the original is gone and base is not given.
    """
    fast_tower = image_tower(model)
    record = acceleration_of(model)
    if record is None:
        raise ValueError("restore: model must be accelerated, got a float one")
    weights = None if fast_tower is None else _base_weights(fast_tower, record, base)
    text = None if record.text is None else base_weights(model, record.text, base)
    memo: dict[int, Any] = {}
    parts = _float_shells(replaced_parts(fast_tower, record.scheme), record.skeletons, memo)
    text_blocks: list[nn.Module] = []
    if record.text is not None:
        fast_blocks = cast(TextTower, find_text(model)).blocks
        text_blocks = _float_shells(fast_blocks, record.text.skeletons, memo)
    result = copy.deepcopy(model, memo)
    if fast_tower is not None and weights is not None:
        runner.detach_exits(find_tower(result))
        skeletons = zip(replaced_paths(fast_tower, record.scheme), record.skeletons, strict=True)
        _load(find_tower(result), weights, fast_tower, dict(skeletons))
    if text is not None and record.text is not None:
        blocks, fast_blocks = (cast(TextTower, find_text(m)).blocks for m in (result, model))
        of_text = {str(i): skeleton for i, skeleton in enumerate(record.text.skeletons)}
        _load(blocks, text, fast_blocks, of_text)
    mark_float(result, parts, text_blocks)
    return result


def _float_shells(
    fast_parts: Iterable[nn.Module], skeletons: Sequence[nn.Module], memo: dict[int, Any]
) -> list[nn.Module]:
    """Float parts without numbers, with the hooks of the fast ones, whose place they take."""
    parts = [copy.deepcopy(skeleton) for skeleton in skeletons]
    for fast_part, part in zip(fast_parts, parts, strict=True):
        carry_hooks(fast_part, part, copier(memo))
        memo[id(fast_part)] = part
    return parts


def _load(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    fast: nn.Module,
    skeletons: Mapping[str, nn.Module],
) -> None:
    """Puts copies of the weights where the fast module lies, in types as it was cast since.

    A parameter that the fast module holds has that one's type; one that it replaced has the type
    that the int8 part computes for, if the part was cast, and else its own.

    Args:
      module: the float one.
      weights: its state.
      fast: the accelerated one.
      skeletons: by path in both, what was replaced.
    """
    dtypes: dict[str, torch.dtype] = {}
    for path, skeleton in skeletons.items():
        now, before = weight_dtypes(fast.get_submodule(path), skeleton)
        if now != before:
            dtypes |= {f"{path}.{name}": now for name, _ in skeleton.named_parameters()}
    held = {name: p for name, p in fast.named_parameters() if p.is_floating_point()}
    dtypes |= {name: parameter.dtype for name, parameter in held.items()}
    device = next(fast.parameters()).device
    copies = {
        name: tensor.detach().to(device, dtypes.get(name), copy=True)
        for name, tensor in weights.items()
    }
    module.load_state_dict(copies, assign=True)


def _base_weights(
    tower: nn.Module, record: Acceleration, base: nn.Module | Mapping[str, Tensor] | None
) -> Any:
    """State dict of the float tower.

    Raises: as restore.
    """
    weights = _given_weights(tower, record, base)
    base_hash = tower_hash(weights)
    if base_hash != record.base_hash:
        raise ValueError(
            f"restore: {'base' if base is not None else 'the original model'} must hold the weights"
            f" that accelerate saw (sha256 {record.base_hash[:12]}), got {base_hash[:12]}; give"
            " base=<model or state dict with the original weights>"
        )
    return weights


def _given_weights(
    tower: nn.Module, record: Acceleration, base: nn.Module | Mapping[str, Tensor] | None
) -> Any:
    if isinstance(base, nn.Module):
        return find_tower(base).state_dict()
    if base is not None:
        if f"{tower_spec(tower).patch_embedding.path}.weight" in base:
            return base
        for path in family_of(tower).paths:
            prefix = f"{path}."
            inside = {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}
            if inside:
                return inside
        return base
    original = None if record.original is None else record.original()
    if original is None:
        raise LookupError(
            "restore: the original model is gone, and the fast one holds no float weights; give"
            " base=<the original model or its state dict>"
        )
    return original.state_dict()
