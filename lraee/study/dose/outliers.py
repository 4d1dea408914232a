"""The dose: outliers of a known size in the activations of a tower that computes the same in float.

A norm's channel times s, and the column of the next weight that reads it divided by s, is the same
function: (s y_j) (W_ij / s) = y_j W_ij. What a quantizer sees is not the same: one channel of its
input is s times as large, and one scale for the whole tensor leaves 1 / s of the levels to the
others. OpenAI's CLIP has such channels; a small tower has not.
"""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lraee.calibration.targets import nearest
from lraee.layers.scheme import INT8
from lraee.study.smooth import next_weights
from lraee.towers.families import block_specs, blocks_of, encode, find_tower, require_supported

CHANNELS = 4
"""Channels of each norm that get the dose."""
_BATCH = 64


@torch.no_grad()
def dosed(model: nn.Module, scale: float, *, channels: int = CHANNELS, seed: int = 0) -> nn.Module:
    """A float copy that computes the same, with some channels of each norm times `scale`.

    For each norm before attention and MLP, `channels` of its D channels are drawn; gamma and beta
    of these are multiplied by `scale`, and the columns of the next weight that read them divided
    by it. A power of two gives the same bits in float (short of overflow and subnormal numbers),
    another scale the same numbers but for rounding.

    Args:
      model: a float CLIP model, or its image tower; stays as it is.
      scale: above 0; 1 changes nothing.
      channels: 1 to D.
      seed: of the channels, drawn norm by norm in the order of the blocks.
    Raises: ValueError on scale or channels; TypeError or NotImplementedError on a tower whose
      blocks cannot be read, or whose norms have no gamma.
    """
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"dosed: scale must be a finite number above 0, got {scale}")
    require_supported(find_tower(model), INT8)
    result = copy.deepcopy(model)
    tower = find_tower(result)
    source = torch.Generator().manual_seed(seed)
    for block, spec in zip(blocks_of(tower), block_specs(tower), strict=True):
        for name, weights in next_weights(block, spec).items():
            norm = cast(nn.LayerNorm, block.get_submodule(name))
            if norm.weight is None:
                raise NotImplementedError(f"dosed: norms must have a gamma, got {name} without")
            D = norm.weight.numel()
            if not 1 <= channels <= D:
                raise ValueError(f"dosed: channels must be 1 to {D}, got {channels}")
            _scale(norm, weights, torch.randperm(D, generator=source)[:channels], scale)
    return result


def _scale(norm: nn.LayerNorm, weights: list[Tensor], chosen: Tensor, scale: float) -> None:
    for parameter in (norm.weight, norm.bias):
        if parameter is not None:
            parameter[chosen] *= scale
    for weight in weights:
        weight[:, chosen] /= scale


@dataclass(frozen=True)
class FloatCheck:
    """What a dose changed in float.

    Args:
      photos: that both models ran on.
      same_answers: photos with the same nearest class.
      largest_error: largest ||y' - y|| / ||y|| of an embedding.
    """

    photos: int
    same_answers: int
    largest_error: float


@torch.inference_mode()
def check_float(
    model: nn.Module, changed: nn.Module, images: Tensor, classes: Tensor
) -> FloatCheck:
    """Both float models on the same images [n, 3, H, W], n >= 1; classes are unit rows [K, E]."""
    y, other = (encode(each, images, batch=_BATCH).float() for each in (model, changed))
    error = (other - y).norm(dim=1) / y.norm(dim=1)
    same = nearest(y, classes) == nearest(other, classes)
    return FloatCheck(len(images), int(same.sum()), float(error.max()))
