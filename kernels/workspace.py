"""Memory shared by the programs of one launch: split-K partial sums and arrival tickets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.kernels.configs import WORKSPACE_PARTIALS, WORKSPACE_TICKETS


@dataclass(frozen=True)
class Workspace:
    """For one launch at a time: two streams must not share one.

    partials: int32 [WORKSPACE_PARTIALS], any content.
    tickets: int32 [WORKSPACE_TICKETS], zero before and after each launch.
    """

    partials: Tensor
    tickets: Tensor

    @staticmethod
    def allocate(device: torch.device) -> "Workspace":
        """A new workspace, outside any captured region."""
        partials = torch.empty(WORKSPACE_PARTIALS, dtype=torch.int32, device=device)
        return Workspace(partials, torch.zeros(WORKSPACE_TICKETS, dtype=torch.int32, device=device))


_given: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


@contextmanager
def using(space: Workspace) -> Iterator[None]:
    """Inside, launches of this thread use `space`, on whatever stream: for a capture."""
    token = _given.set(space)
    try:
        yield
    finally:
        _given.reset(token)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_lock = threading.Lock()


def of_current_stream(device: torch.device) -> Workspace:
    """The workspace that this thread was given, or that of the device's current stream.

    The latter is allocated at its first use.
    """
    given = _given.get()
    if given is not None:
        return given
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream)
    with _lock:
        if key not in _workspaces:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "workspace: must be allocated before capture; run the operators once on the"
                    " capturing stream, or give the launchers a Workspace"
                )
            _workspaces[key] = Workspace.allocate(device)
        return _workspaces[key]
