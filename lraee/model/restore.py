"""restore: an accelerated model to the float one that it was made of."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lraee.layers.modules import carry_hooks
from lraee.model.acceleration import (
    Acceleration,
    acceleration_of,
    copier,
    mark_float,
    replaced_parts,
)
from lraee.towers import runner
from lraee.towers.families import family_of, find_tower, tower_spec
from lraee.towers.state import tower_hash

Model = TypeVar("Model", bound=nn.Module)


def restore(model: Model, base: nn.Module | Mapping[str, Tensor] | None = None) -> Model:
    """The float model again: the image tower as it was before accelerate, bit for bit.

    The fast model holds no float weights. They come from the original model, if it is still alive
    and was not changed, or from `base`. All that accelerate copied (text tower, logit scale) is
    copied from the fast model.

    Args:
      model: an accelerated model; it stays as it is.
      base: the original model, or its state dict.
    Returns: a new float model.
    Raises: ValueError if model is float, or if the weights are not those that accelerate saw;
      LookupError if the original is gone and base is not given.
    """
    fast_tower = find_tower(model)
    record = acceleration_of(model)
    if record is None:
        raise ValueError("restore: model must be accelerated, got a float one")
    weights = _base_weights(fast_tower, record, base)
    base_hash = tower_hash(weights)
    if base_hash != record.base_hash:
        raise ValueError(
            f"restore: {'base' if base is not None else 'the original model'} must hold the weights"
            f" that accelerate saw (sha256 {record.base_hash[:12]}), got {base_hash[:12]}; give"
            " base=<model or state dict with the original weights>"
        )
    memo: dict[int, Any] = {}
    parts = [copy.deepcopy(skeleton) for skeleton in record.skeletons]
    for fast_part, part in zip(replaced_parts(fast_tower, record.scheme), parts, strict=True):
        carry_hooks(fast_part, part, copier(memo))
        memo[id(fast_part)] = part
    result = copy.deepcopy(model, memo)
    runner.detach_exits(find_tower(result))
    device = next(fast_tower.parameters()).device
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in weights.items()}
    find_tower(result).load_state_dict(copies, assign=True)
    mark_float(result, parts)
    return result


def _base_weights(
    tower: nn.Module, record: Acceleration, base: nn.Module | Mapping[str, Tensor] | None
) -> Any:
    """State dict of the float tower."""
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
