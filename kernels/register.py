"""Registration of the launchers for CUDA tensors. Kernels are imported at the first call of one."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from lraee.kernels.operands import from_schema

OLDEST_TRITON = (3, 4)
"""Tuples inside kernels and triton.knobs."""

LAUNCHERS = (
    "quantize_rows",
    "layer_norm_quantize",
    "int8_linear",
    "float_linear",
    "gated_quantize",
    "int8_attention",
    "float_attention",
    "int8_block",
    "exit_probe",
)
"""Operators with a kernel; each is a module of this package with a launcher of its name."""


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used by this installation, or None; looks at no device."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton must be {oldest} or newer, got {triton.__version__}"
    return None


def is_interpreted() -> bool:
    """Whether this process has Triton's interpreter, as it was chosen when triton was imported."""
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.sum, InterpretedFunction)


@functools.cache
def reason_of(device: torch.device) -> str | None:
    """Why the kernels do not run on this CUDA device, or None."""
    from lraee.kernels.archs import unsupported_reason

    major, minor = torch.cuda.get_device_capability(device)
    reason: str | None = unsupported_reason(10 * major + minor)
    return reason


def implementation(name: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher of this name, imported when first called.

    On a GPU that the int8 kernels do not support (kernels.archs says which, and why) the definition
    runs instead, in plain torch on that GPU; doctor gives the reason.
    """

    @functools.wraps(definition)
    def call(first: Tensor, *arguments: Any, **options: Any) -> Any:
        if first.device.type == "cuda" and reason_of(first.device) is not None:
            return definition(first, *arguments, **options)
        launcher = getattr(importlib.import_module(f"lraee.kernels.{name}"), name)
        return launcher(first, *arguments, **options)

    return call


def register(library: Library, definitions: Mapping[str, Callable[..., Any]]) -> str | None:
    """Registers every launcher for the CUDA key of library, unless this installation cannot run it.

    Args:
      library: the one that defines the operators.
      definitions: each operator in plain torch, of records (see operands).
    Returns: None, or the reason why nothing was registered.
    """
    reason = unavailable_reason()
    if reason is None:
        for name in LAUNCHERS:
            function = implementation(name, definitions[name])
            library.impl(name, from_schema(name, function), "CUDA")
    return reason
