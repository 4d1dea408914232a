"""SmoothQuant: outliers move from activations into weights before quantization.

Source: Xiao et al., arXiv 2211.10438.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.scheme import INT8, Scheme
from lraee.layers.spec import BlockSpec, tensor_at
from lraee.model.accelerate import accelerate
from lraee.model.fidelity import compare
from lraee.towers.families import (
    block_specs,
    blocks_of,
    encode,
    find_tower,
    require_supported,
)

_BATCH = 64

NextWeights = dict[str, list[Tensor]]
"""Paths of the norms of a block, and the weights [n, D] that multiply what each gives."""


@torch.no_grad()
def smoothed(model: nn.Module, images: Tensor, *, alpha: float = 0.5) -> nn.Module:
    """A float copy that computes the same with smoother inputs of QKV and of the first MLP layer.

    Channel j of each LayerNorm is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), in its
    gamma and beta, and column j of the next weight is multiplied by it: the product stays, within
    rounding. A channel that is 0 everywhere, in X or in W, stays as it is.

    Args:
      model: a float CLIP model, or its image tower; stays as it is.
      images: calibration images [n, 3, H, W], n >= 1, that max|X_j| is taken over.
      alpha: 0 leaves every weight column with the same maximum, 1 every activation channel.
    Raises: ValueError on alpha or images, TypeError or NotImplementedError on a tower whose blocks
      cannot be read.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smoothed: alpha must be in [0, 1], got {alpha}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"smoothed: images must be [n, 3, H, W], n >= 1, got {list(images.shape)}")
    require_supported(find_tower(model), INT8)
    result = copy.deepcopy(model)
    tower = find_tower(result)
    blocks = list(blocks_of(tower))
    weights = [next_weights(b, s) for b, s in zip(blocks, block_specs(tower), strict=True)]
    with _largest(blocks, weights) as largest:
        _embeddings(result, images)
    for block, by_norm, following in zip(blocks, largest, weights, strict=True):
        for name, x_max in by_norm.items():
            norm = cast(nn.LayerNorm, block.get_submodule(name))
            _move(norm, following[name], x_max, alpha)
    return result


def best_alpha(
    model: nn.Module,
    images: Tensor,
    *,
    alphas: Sequence[float] = (0.25, 0.5, 0.75),
    scheme: str | Scheme,
) -> float:
    """The alpha whose quantized tower stays nearest to the float one on these images.

    Nearest: the largest mean cosine of unit embeddings after the float mean is taken off; the
    first of equals. The same images give the scales, so they must be calibration images alone.

    Args:
      model, images: see smoothed.
      alphas: what to try, one at least.
      scheme: of lraee.accelerate.
    Raises: see smoothed and lraee.accelerate.
    """
    if not alphas:
        raise ValueError("best_alpha: alphas must be one at least, got none")
    expected = _embeddings(model, images)

    def nearness(alpha: float) -> float:
        fast = accelerate(smoothed(model, images, alpha=alpha), scheme=scheme, inplace=True)
        return compare(expected, _embeddings(fast, images)).centred

    return max(alphas, key=nearness)


def next_weights(block: nn.Module, spec: BlockSpec) -> NextWeights:
    """The norms of a block, and the weights that multiply what each gives."""
    gate = () if spec.mlp.gate is None else spec.mlp.gate.parts
    following = {
        spec.norm_1.path: spec.attention.in_proj.parts,
        spec.norm_2.path: (*gate, *spec.mlp.fc1.parts),
    }
    return {
        norm: [tensor_at(block, name) for name in dict.fromkeys(part.weight for part in parts)]
        for norm, parts in following.items()
    }


def _move(norm: nn.LayerNorm, weights: Sequence[Tensor], x_max: Tensor, alpha: float) -> None:
    """Divides the norm by s and multiplies the columns of the weights behind it."""
    w_max = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    s = smoothing_scale(x_max, w_max.float(), alpha)
    for parameter in (norm.weight, norm.bias):
        if parameter is not None:
            parameter.div_(s)
    for weight in weights:
        weight.mul_(s)


def smoothing_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s = x_max^alpha / w_max^(1 - alpha), float32 [K]; 1 where either is 0 or not finite."""
    s = x_max**alpha / w_max ** (1.0 - alpha)
    is_usable = (x_max > 0) & (w_max > 0) & s.isfinite() & (s > 0)
    return torch.where(is_usable, s, 1.0)


@contextmanager
def _largest(
    blocks: Sequence[nn.Module], weights: Sequence[NextWeights]
) -> Iterator[list[dict[str, Tensor]]]:
    """max|X_j| float32 [D] of what each block's norms give, by name, over all calls inside."""
    largest: list[dict[str, Tensor]] = [{} for _ in blocks]

    def note(place: int, name: str, y: Tensor) -> None:
        x_max = y.flatten(0, -2).abs().amax(0).float()
        before = largest[place].get(name)
        largest[place][name] = x_max if before is None else torch.maximum(before, x_max)

    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda _, args, y, place=place, name=name: note(place, name, y)
        )
        for place, block in enumerate(blocks)
        for name in weights[place]
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings float32 [n, E]."""
    return F.normalize(encode(model, images, batch=_BATCH), dim=1)
