"""The patch embedding in int8: each patch is a row with its own scale, the convolution a linear."""

from multiprocessing.reduction import ForkingPickler
from typing import cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import by_patch, is_by_patch, output_dtype
from lraee.layers.gradients import without_gradient
from lraee.layers.int8_linear import Int8Linear, to_other_process
from lraee.ops.backend import Backend


class Int8PatchEmbedding(Int8Linear):
    """An Int8Linear that stands for a Conv2d whose stride is its kernel.

    w_q is int8 [D, C * kernel height * kernel width], a patch's values in the order of the
    convolution's weight.
    """

    def __init__(
        self, conv: nn.Conv2d, name: str, w_q: Tensor, w_scale: Tensor, *, backend: Backend
    ) -> None:
        """Stands for `conv` with this quantized weight.

        Args:
          conv: what it replaces, passed by require_by_patch.
          name: its path in the tower, which messages begin with.
          w_q: int8 [D, C * kernel height * kernel width].
          w_scale: float32 [D].
          backend: which implementation to run on.
        """
        super().__init__(w_q, w_scale, conv.bias, dtype=conv.weight.dtype, backend=backend)
        self.name = name
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = self.stride = cast(tuple[int, int], conv.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / kernel, W / kernel], remainders cut off as a Conv2d does.

        Raises: ValueError on images that hold no patch, or of another number of channels or type.
        """
        is_autocast = torch.is_autocast_enabled(input.device.type)
        height, width = self.kernel_size
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"{self.name}: images must have shape [B, {self.in_channels}, H, W], got"
                f" {list(input.shape)}"
            )
        if input.shape[2] < height or input.shape[3] < width:
            raise ValueError(
                f"{self.name}: images must have at least {height} x {width} pixels, got"
                f" {input.shape[2]} x {input.shape[3]}"
            )
        if input.dtype != self.dtype and not is_autocast:
            raise ValueError(f"{self.name}: images must be {self.dtype}, got {input.dtype}")
        out_dtype = output_dtype(input)
        y = by_patch(
            input,
            self.kernel_size,
            lambda x: self.multiply(self.quantize(x), out_dtype=out_dtype),
        )
        return without_gradient(y, (input,))

    @property
    def weight(self) -> Tensor:
        """The weight as numbers [D, C, kernel height, kernel width]; made anew at each call."""
        return super().weight.view(self.out_channels, self.in_channels, *self.kernel_size)


ForkingPickler.register(Int8PatchEmbedding, to_other_process)


def require_by_patch(embedding: nn.Module, name: str) -> None:
    """Raises NotImplementedError on a patch embedding that is not one linear of each patch."""
    if not is_by_patch(embedding) and type(embedding) is not nn.Linear:
        raise NotImplementedError(
            f"accelerate: scheme.patch_embedding must be 'float' for a {name} that is no plain"
            f" Conv2d with a stride of its kernel and no Linear, got"
            f" {str(embedding).splitlines()[0].rstrip('(')}"
        )
