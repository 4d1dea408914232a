"""Towers that embed an image by its class token alone: what follows that token, at any depth."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.spec import tensor_at
from lraee.towers.families import tower_spec
from lraee.towers.spec import TowerSpec


def require_class_token(tower: nn.Module, caller: str) -> TowerSpec:
    """The spec of the tower.

    Raises: NotImplementedError, one line, unless its embedding is the projected class token.
    """
    spec = tower_spec(tower)
    if spec.pooling.kind != "class" or spec.projection is None or spec.final_norm is None:
        without = "" if spec.projection is not None else " and no projection"
        raise NotImplementedError(
            f"{caller}: the tower must embed an image by its class token and project it, got"
            f" pooling {spec.pooling.kind!r}{without}"
        )
    return spec


def finish_class_token(tower: nn.Module, spec: TowerSpec, class_token: Tensor) -> Tensor:
    """projection(final_norm(class_token)) by torch's own layer norm and product, differentiable.

    Args:
      tower: float or accelerated.
      spec: from require_class_token.
      class_token: [..., D] after any block.
    Returns: float32 [..., E].
    """
    projection = spec.projection
    assert projection is not None and spec.final_norm is not None
    norm = cast(nn.LayerNorm, tower.get_submodule(spec.final_norm))
    weight = tensor_at(tower, projection.weight)
    x = class_token.to(weight.dtype)
    y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    y = y @ (weight if projection.is_transposed else weight.t())
    bias = None if projection.bias is None else tensor_at(tower, projection.bias)
    return (y if bias is None else y + bias).float()
