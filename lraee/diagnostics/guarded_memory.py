"""Buffers with poison on every side, so that a load or store out of bounds is seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PAD = 64
"""Elements on each side: a multiple of 16 bytes in every type, for Triton looks at alignment."""

POISON = {torch.int8: 93, torch.int32: 1 << 30, torch.int64: 1 << 60}
"""Whole numbers that no result holds by chance; floats are poisoned with NaN."""


def _poison(dtype: torch.dtype) -> float:
    return POISON.get(dtype, float("nan"))


def _is_poison(pad: Tensor) -> bool:
    return bool((pad.isnan() if pad.is_floating_point() else pad == _poison(pad.dtype)).all())


def poisoned(x: Tensor, row_pad: int = 0, device: torch.device | None = None) -> Tensor:
    """A copy of x inside a poisoned buffer; row_pad > 0 leaves poison between rows too."""
    *outer, width = x.shape if x.dim() else (1,)
    rows = x.numel() // max(width, 1)
    stride = width + row_pad
    buffer = torch.full(
        (2 * PAD + rows * stride,), _poison(x.dtype), dtype=x.dtype, device=device or x.device
    )
    strides = [stride] * len(outer)
    for axis in range(len(outer) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * outer[axis + 1]
    view = buffer[PAD:].as_strided(x.shape, (*strides, 1), PAD)
    view.copy_(x)
    return view


def poisoned_all(arguments: Any, row_pad: int = 0, device: torch.device | None = None) -> Any:
    """Poisoned copies of the tensors of a list, dict or record.

    row_pad for those with two dimensions, but not inside a record: weights are contiguous.
    """

    def one(value: object) -> object:
        if isinstance(value, tuple):
            return type(value)(*poisoned_all(list(value), 0, device))
        if not isinstance(value, Tensor):
            return value
        return poisoned(value, row_pad if value.dim() > 1 else 0, device)

    if isinstance(arguments, dict):
        return {name: one(value) for name, value in arguments.items()}
    return [one(value) for value in arguments]


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Everything torch.empty gives inside lies between poison, which must be there at the end.

    Raises: AssertionError where something was stored out of bounds.
    """
    buffers: list[Tensor] = []

    def empty(shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(torch.Size(shape).numel())
        buffer = torch.full((2 * PAD + size,), _poison(dtype), dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[PAD : PAD + size].view(shape)

    with mock.patch("torch.empty", empty):
        yield
    for buffer in buffers:
        assert _is_poison(buffer[:PAD]) and _is_poison(buffer[-PAD:]), "stored out of bounds"


def is_intact(view: Tensor) -> bool:
    """Whether the poison before and behind a tensor of `poisoned` is still there."""
    size = view.untyped_storage().nbytes() // view.element_size()
    buffer = view.as_strided((size,), (1,), 0)
    return _is_poison(buffer[:PAD]) and _is_poison(buffer[-PAD:])
