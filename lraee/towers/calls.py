"""What towers cannot do: calls by tracers, exits without numbers or without one embedding."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lraee.layers.gradients import is_traced
from lraee.layers.modules import NO_SCRIPT
from lraee.towers.families import tower_spec


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_for_onnx() -> bool:
    """Whether ONNX is exported; torch.compile alone takes the question for False."""
    return bool(torch.onnx.is_in_onnx_export())


def require_plain_call() -> None:
    """Raises NotImplementedError inside tracers and transforms of functions.

    TorchScript and ONNX lack int8 blocks; vmap has no rule for them, grad and jvp no derivative.
    """
    if is_traced() or _is_for_onnx():
        raise NotImplementedError(NO_SCRIPT)
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "encode_image: an int8 tower must be called outside torch.func's transforms (vmap,"
            " grad, jvp) and forward-mode derivatives, which its operators have no rules for; call"
            " it on a batch, or transform the float model (lraee.restore)"
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
