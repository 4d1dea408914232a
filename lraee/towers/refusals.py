"""Calls that no int8 tower can answer: one line says why and what to do."""

import torch
from torch import Tensor


def require_no_script() -> None:
    """Raises NotImplementedError inside torch.jit.trace and ONNX export: they lack int8 blocks."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # type: ignore[no-untyped-call]
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
