"""The float layers around the blocks, computed row by row: the same bits in any batch.

A library's convolution or matrix product may choose another order of summation for another batch
size or number of threads. These layers go through torch.ops.lraee.float_linear instead, whose order
is fixed, on the CPU and where its CUDA kernel runs. On other devices they are torch's own.
"""

from collections.abc import Callable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lraee.layers.gradients import is_traced, without_gradient
from lraee.layers.modules import Adapter
from lraee.ops.backend import Backend, implementation, operators


class Rowwise(Adapter):
    """A float part of a tower, its sums in one order."""

    adapter_prefix: ClassVar[str] = "Rowwise"
    own_attributes: ClassVar[tuple[str, ...]] = ("rowwise_backend",)
    rowwise_backend: Backend


class OneLinear(Rowwise):
    """A part that is one product with its weight."""

    own_attributes: ClassVar[tuple[str, ...]] = ("rowwise_backend", "by_step")
    by_step: "ByStep"

    @classmethod
    def adopt(cls, module: nn.Module, **attributes: object) -> None:
        """See Adapter."""
        super().adopt(module, by_step=ByStep(), **attributes)

    def _multiply(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        own = cast(nn.Linear, self)
        return rowwise_linear(x, self.by_step(own.weight), own.bias, self.rowwise_backend)


class RowwiseConv2d(OneLinear):
    """The patch embedding: a Conv2d whose stride is its kernel, so one linear of each patch."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is a plain Conv2d of whole patches."""
        return is_by_patch(module)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H / kernel, W / kernel], remainders cut off as a Conv2d does."""
        conv = cast(nn.Conv2d, self)
        is_fixed_here = is_fixed(input.device, self.rowwise_backend)
        if not is_fixed_here or input.dim() != 4 or input.dtype != conv.weight.dtype:
            return cast(Tensor, super().forward(input))
        _, C, H, W = input.shape
        height, width = cast(tuple[int, int], conv.kernel_size)
        if C != conv.in_channels or height > H or width > W:
            return cast(Tensor, super().forward(input))  # which says what is wrong
        return by_patch(input, (height, width), self._multiply)


def is_by_patch(conv: nn.Module) -> bool:
    """Whether this is a plain Conv2d that is one linear of each patch."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def by_patch(images: Tensor, kernel: tuple[int, int], linear: Callable[[Tensor], Tensor]) -> Tensor:
    """A convolution whose stride is its kernel, as a linear of each patch.

    Args:
      images: [B, C, H, W]; what does not fill a patch at the right and the bottom is cut off.
      kernel: height and width of a patch.
      linear: patches [B * rows * columns, C * height * width], each in the order of a convolution's
        weight -> [B * rows * columns, D].
    Returns: [B, D, rows, columns].
    """
    B, C, H, W = images.shape
    height, width = kernel
    rows, columns = H // height, W // width
    whole = images[:, :, : rows * height, : columns * width]
    patches = whole.reshape(B, C, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    y = linear(patches.reshape(B * rows * columns, C * height * width))
    D = y.shape[1]
    return y.view(B, rows * columns, D).transpose(1, 2).view(B, D, rows, columns)


class RowwiseLinear(OneLinear):
    """A linear that stays float: in a block by the scheme, or after the blocks."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is a plain nn.Linear."""
        return type(module) is nn.Linear

    @classmethod
    def of(cls, weight: nn.Parameter, bias: nn.Parameter | None, backend: Backend) -> nn.Linear:
        """The linear of these parameters themselves: no copy is made."""
        N, K = weight.shape
        linear = nn.Linear(K, N, bias=bias is not None, device="meta")
        linear.weight = weight
        linear.bias = bias  # type: ignore[assignment]
        cls.adopt(linear, rowwise_backend=backend)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """Any float type [..., K] -> [..., N]."""
        return self._multiply(input)


class ByStep:
    """A weight as float_linear reads it on a CPU without a copy: float32, [K, N] in memory.

    The parameter itself stays contiguous, as what saves or flattens a model expects. The copy is
    made at the first call and again when the parameter is another tensor, lies elsewhere or was
    written to; a write through `weight.data` alone goes unnoticed, as it does in autograd. It is no
    part of the module's state: copies and pickles of the module start without it.
    """

    def __init__(self) -> None:
        """Empty."""
        self._held: tuple[tuple[object, ...], Tensor] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """[N, ...] -> [N, K] with the same numbers."""
        rows = weight.flatten(1)
        is_recorded = torch.compiler.is_compiling() or is_traced()
        if is_recorded or weight.device.type != "cpu":
            return rows
        # a fake tensor has no address, an inference tensor counts no versions
        if type(weight) is not nn.Parameter or weight.is_inference():
            return rows
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
        held = self._held
        if held is None or held[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                held = key, rows.detach().t().to(torch.float32, copy=True).contiguous().t()
            self._held = held
        return held[1]

    def __reduce__(self) -> tuple[type["ByStep"], tuple[()]]:
        return ByStep, ()

    def __deepcopy__(self, memo: object) -> "ByStep":
        return ByStep()


def is_fixed(device: torch.device, backend: Backend) -> bool:
    """Whether float_linear has one order of sums on this device, and time to keep it."""
    return device.type == "cpu" or implementation(backend, device) != "reference"


def rowwise_linear(x: Tensor, w: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
    """x @ w.T + bias, summed in float32 in one fixed order.

    Args:
      x: any float type [..., K].
      w: any float type [N, K].
      bias: any float type [N] or None.
      backend: which implementation to run on.
    Returns: [..., N] in the type of x, or of autocast where that is on, as torch's linear.
    """
    if not is_fixed(x.device, backend):
        return torch.nn.functional.linear(x, w, bias)
    dtype = output_dtype(x)
    is_native = x.device.type != "cpu" and dtype in (torch.float16, torch.bfloat16)
    inside = dtype if is_native else torch.float32
    rows = x.reshape(-1, w.shape[1]).to(inside)
    b = None if bias is None else bias.to(inside)
    y = cast(Tensor, operators(backend).float_linear(rows, w.to(inside), b))
    result = y.to(dtype).view(*x.shape[:-1], w.shape[0])
    return without_gradient(result, (x, w, bias))


def output_dtype(x: Tensor) -> torch.dtype:
    """The type of a linear's result: that of its input x, or of autocast where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
