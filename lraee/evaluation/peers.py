"""Other ways to run an image tower with less precision, beside which a scheme is measured."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.towers.families import as_input, find_tower, image_size

PEERS = ("bfloat16", "openvino")
"""torch in bfloat16; OpenVINO with INT8 by NNCF (extra `peers`), which needs calibration images."""


class Peer(nn.Module):
    """An image tower that another runtime runs, called as a CLIP model is.

    Args:
      compiled: OpenVINO's model, [B, 3, H, W] -> [B, E].
      weight_bytes: of its constants.
    """

    def __init__(self, compiled: Any, weight_bytes: int) -> None:
        super().__init__()
        self._compiled, self.weight_bytes = compiled, weight_bytes
        self.device_and_type = nn.Parameter(torch.empty(0), requires_grad=False)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings float32 [B, E]."""
        y = torch.from_numpy(np.array(self._compiled(image.numpy())[0]))
        return F.normalize(y, dim=-1) if normalize else y


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy with weights and activations in bfloat16."""
    return copy.deepcopy(model).bfloat16()


def openvino_int8(model: nn.Module, images: Tensor | Iterable[Tensor]) -> Peer:
    """OpenVINO, INT8 by NNCF post-training quantization for transformers, the rest in float32.

    Args:
      model: float, a CLIP model or any with encode_image.
      images: calibration images as `accelerate` takes them.
    Raises: ImportError where OpenVINO or NNCF is missing.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise ImportError(
            f"evaluate: {error.name} is not installed: pip install 'lraee[peers]'"
        ) from error
    size = image_size(model)
    given = [as_input(model, part) for part in ([images] if isinstance(images, Tensor) else images)]
    rows = [_centre(image, size)[None].numpy() for part in given for image in part]
    whole = _Embedding(model).eval()
    with torch.no_grad():
        converted = openvino.convert_model(
            whole, example_input=torch.from_numpy(rows[0]), input=[-1, 3, *size]
        )
    quantized = nncf.quantize(
        converted, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
    )
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    held = (op.data.nbytes for op in quantized.get_ops() if op.get_type_name() == "Constant")
    return Peer(openvino.Core().compile_model(quantized, "CPU", options), sum(held))


class _Embedding(nn.Module):
    """encode_image as a module that can be traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        find_tower(model)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E]."""
        y: Tensor = self.model.encode_image(x)  # type: ignore[operator]
        return y


def _centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (image.shape[1] - size[0]) // 2, (image.shape[2] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]
