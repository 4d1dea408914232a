"""What towers cannot do: calls by tracers, exits without numbers or without one embedding."""

import torch
from torch import Tensor, nn

from lraee.layers.gradients import is_traced
from lraee.towers.families import tower_spec


def require_no_script() -> None:
    """Raises NotImplementedError inside torch.jit.trace and ONNX export: they lack int8 blocks."""
    if is_traced() or torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "encode_image: an int8 tower must not be traced for TorchScript or ONNX, which have no"
            " int8 blocks; use torch.export inside lraee.full_depth, or convert the float model"
            " (lraee.restore)"
        )


def require_numbers(x: Tensor) -> None:
    """Raises NotImplementedError where no router can read its scores."""
    if x.is_meta or torch.compiler.is_exporting():
        where = "on the meta device" if x.is_meta else "of torch.export"
        raise NotImplementedError(
            f"exits: images must have numbers that decide where each exits, got images {where}; use"
            " lraee.full_depth"
        )


def embedding_size(tower: nn.Module) -> int:
    """E of a tower that projects one vector per image.

    Raises: NotImplementedError on another one.
    """
    spec = tower_spec(tower)
    if spec.embedding_size is None:
        raise NotImplementedError(
            f"exits: the tower must be {spec.family}'s own {spec.float_class.__name__} with one"
            f" projected vector per image, got {type(tower).__name__} with pooling"
            f" {spec.pooling.kind!r}"
        )
    return spec.embedding_size
