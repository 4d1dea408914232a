"""How much of each rescue is due to quantization: the same exits on the float backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lraee.study.quadrants import owed
from lraee.study.schema import Owed


@dataclass(frozen=True)
class CorrectPhotos:
    """Which report photos one backbone gets right.

    Args:
      backbone: its name.
      right_with: recipe -> bool [n] per seed, with exits.
      right_full: bool [n], at full depth.
    """

    backbone: str
    right_with: Mapping[str, Sequence[Tensor]]
    right_full: Tensor


def attribute_to_quantization(quantized: CorrectPhotos, in_float: CorrectPhotos) -> list[Owed]:
    """One row per recipe."""
    return [
        owed(
            right, quantized.right_full, in_float.right_with[recipe], in_float.right_full,
            backbone=quantized.backbone, recipe=recipe,
        )
        for recipe, right in quantized.right_with.items()
    ]  # fmt: skip
