"""What a launcher would launch, recorded without a GPU: kernels, grids, arguments, constants.

Launchers are called with tensors on torch's meta device, which have shapes and no values. From the
record follow the number of launches, what Triton would compile, and how many bytes are touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import ASTSource

from lraee.kernels import launch
from lraee.kernels.operands import PackedLinear

POINTERS = {
    torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32",
    torch.float16: "*fp16", torch.bfloat16: "*bf16",
}  # fmt: skip
ALIGNMENT = 16
"""torch's allocator aligns storage to 512 bytes; Triton uses 16."""
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One call of launch.start; arguments by name, constexpr ones apart."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, object]
    constants: dict[str, object]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Name of the kernel without underscores at its ends."""
        return str(self.kernel.fn.__name__).strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        """Size of the grid."""
        return int(torch.Size(self.grid).numel())

    def source(self) -> ASTSource:
        """What Triton compiles for this launch, with the specialisations of its own launcher.

        An argument of 1 becomes a constant; one that 16 divides is marked so.
        """
        signature: dict[str, str] = {}
        constants = dict(self.constants)
        attributes: dict[tuple[int], list[list[object]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            value = self.arguments[name]
            is_divisible = False
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                is_divisible = True
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                assert isinstance(value, int), (name, value)
                signature[name] = "i32" if value < 2**31 else "i64"
                if not parameter.do_not_specialize:
                    is_divisible = value % ALIGNMENT == 0
                    if value == 1:
                        signature[name], constants[name] = "constexpr", 1
            if is_divisible:
                attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
        return ASTSource(self.kernel, signature, constants, attributes)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not started but listed."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        names = kernel.arg_names[: len(arguments)]
        by_name = dict(zip(names, arguments, strict=True))
        launches.append(Launch(kernel, grid, by_name, constants, options))  # type: ignore[arg-type]

    with mock.patch.object(launch, "start", record):
        yield launches


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches that this call would make."""
    with recorded() as launches:
        call()
    return launches


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor with a shape and no values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_linear(N: int, K: int, *, has_layer_scale: bool = False) -> PackedLinear:
    """The operands of a linear [N, K], with shapes and no values."""
    layer_scale = meta(N) if has_layer_scale else None
    w, w_sum = meta(N, K, dtype=torch.int8), meta(N, dtype=torch.int32)
    return PackedLinear(w, meta(N), w_sum, meta(N), layer_scale)
