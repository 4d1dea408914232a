"""Which implementation of the operators a tower runs on."""

from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch

from lraee.kernels import register
from lraee.kernels.operands import to_schema
from lraee.ops import registry

Backend = Literal["auto", "reference", "cpu", "triton"]

_DISPATCH_KEYS = {"cpu": "CPU", "triton": "CUDA"}

# Known from import on: torch.compile cannot trace the question.
_REGISTERED = frozenset(
    key
    for key in _DISPATCH_KEYS.values()
    if torch._C._dispatch_has_kernel_for_dispatch_key("lraee::int8_linear", key)
)


_DEFINITIONS = SimpleNamespace(**registry.DEFINITIONS)
# .default spares each call the search for an overload
_DISPATCHED = SimpleNamespace(
    **{name: to_schema(name, getattr(torch.ops.lraee, name).default) for name in registry.OPERATORS}
)


def operators(backend: Backend) -> Any:
    """The operators by name: the plain-torch definitions, or what PyTorch's dispatcher chooses.

    Either way they take records (lraee.kernels.operands) and check nothing: a module's operands are
    checked where it is built.
    """
    return _DEFINITIONS if backend == "reference" else _DISPATCHED


def implementation(backend: Backend, device: torch.device) -> str:
    """What runs `int8_linear` there: reference, cpu or triton."""
    if backend == "reference":
        return "reference"
    for name, key in _DISPATCH_KEYS.items():
        if device.type == key.lower() and _is_registered(key):
            is_known = device.type != "cuda" or register.reason_of(device) is None
            return name if is_known else "reference"
    return "reference"


def require_backend(backend: str, device: torch.device) -> None:
    """Raises one line unless `backend` is a known name whose implementation runs on the device.

    Raises: ValueError on an unknown name, RuntimeError if the implementation is not there.
    """
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"accelerate: backend must be one of {names}, got {backend!r}")
    if backend in _DISPATCH_KEYS:
        reason = _why_not(backend, device)
        if reason is not None:
            raise RuntimeError(f"accelerate: backend must run here, got {backend!r}: {reason}")


def _why_not(backend: str, device: torch.device) -> str | None:
    key = _DISPATCH_KEYS[backend]
    if device.type != key.lower():
        return f"it needs a model on {key.lower()}, this one is on {device}; move it, or use 'auto'"
    if _is_registered(key):
        return None
    if backend == "cpu":
        return f"the C++ extension is not available ({registry.CPU_EXTENSION_ERROR})"
    return f"the Triton kernels are not available ({registry.TRITON_ERROR})"


def _is_registered(key: str) -> bool:
    return key in _REGISTERED
