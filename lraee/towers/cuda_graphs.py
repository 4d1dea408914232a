"""CUDA graphs of an accelerated tower: one per bucket of the batch, exits within it.

A block on a GPU takes some ten microseconds, starting its kernels from Python takes ten times as
long. So a tower, or a segment of it, is captured when it is first used with a batch of some bucket,
and replayed from then on: images are copied into the memory that the graph reads, followed by
padding rows. Every operator works row by row, so the results are those of the same calls without a
graph.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from lraee.kernels import workspace
from lraee.kernels.workspace import Workspace

Function = Callable[[Tensor], tuple[Tensor, ...]]

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that graphs are made for; larger batches keep a GPU busy without them."""

_log = logging.getLogger("lraee")


class Captured(NamedTuple):
    """A function for batches of one size: replay() computes `outputs` from `input`."""

    replay: Callable[[], None]
    input: Tensor
    outputs: tuple[Tensor, ...]


class _State:
    """What a graph depends on: modules, where their tensors lie, and no hooks."""

    def __init__(self, tower: nn.Module) -> None:
        parts = [*tower.modules()]
        children = [(m._modules, name) for m in parts for name in m._modules]
        held = [(d, n) for m in parts for d in (m._parameters, m._buffers) for n in d]
        self._children = [(*place, place[0][place[1]]) for place in children]
        # The tensors themselves: as long as they live, no other can lie where they do
        self._tensors = [(d, n, d[n], _address(d[n])) for d, n in held]
        self._hooks = [h for m in parts for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [modules._global_forward_hooks, modules._global_forward_pre_hooks]

    @property
    def has_hooks(self) -> bool:
        """Whether a hook is registered, which a graph would not call."""
        return any(self._hooks)

    def is_current(self) -> bool:
        """Whether a graph captured then still computes what the tower would."""
        return all(d.get(name) is child for d, name, child in self._children) and all(
            d.get(name) is tensor and _address(tensor) == address
            for d, name, tensor, address in self._tensors
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Graphs:
    """The graphs of one tower, for one call at a time: `with graphs.of(tower, device) as held`.

    Calls of other threads wait for the lock, and their streams for what the last call reads. All
    graphs share one pool of memory: a result is overwritten when any of them runs again.
    """

    def __init__(self, tower: nn.Module, device: torch.device) -> None:
        """See the class."""
        self.device = device
        self._tower = weakref.ref(tower)
        self._lock = threading.RLock()
        self._clear()
        self._space = Workspace.allocate(device)
        # No launch that runs beside others writes partial sums
        self._space_beside = Workspace(self._space.partials, self._space.tickets.clone())
        self._stream_beside: Any = None
        self._constants: dict[Hashable, tuple[tuple[float, ...], Tensor]] = {}
        self._pool: Any = None
        self._on_device = on_device(device)
        with self._on_device:
            self._reads = new_event()

    def _clear(self) -> None:
        tower = self._tower()
        assert tower is not None
        self._captured: dict[Hashable, Captured] = {}
        self.checks: dict[Hashable, bool] = {}  # by callers: whether a graph gave the right bits
        self._state = _State(tower)
        self._refusal: str | None = None

    def can_capture(self) -> bool:
        """Whether the tower has no hooks, and no capture of it has failed."""
        return self._refusal is None and not self._state.has_hooks

    def __enter__(self) -> "Graphs":
        self._lock.acquire()
        self._on_device.__enter__()
        self._reads.wait()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.record()
        self._on_device.__exit__(*error)
        self._lock.release()

    def run(self, name: Hashable, function: Function, z: Tensor) -> tuple[Tensor, ...]:
        """function(z), each result with z's number of rows, valid until the next call of run.

        Args:
          name: of the function and of all numbers in it that are not tensors of the tower.
          function: [bucket, …] -> tensors [bucket, …], row by row.
          z: 1 to BUCKETS[-1] rows.
        """
        B = z.shape[0]
        key = (name, bucket_of(B), z.dtype, z.shape[1:])
        captured = self._captured.get(key)
        if captured is not None and not self._state.has_hooks:
            captured.input[:B].copy_(z)
            captured.replay()
            # Checked while the GPU computes; what it reads is held by the state
            if self._state.is_current():
                return tuple(output[:B] for output in captured.outputs)
            self._clear()
        if not self.can_capture():
            return function(z)
        try:
            captured = self._captured[key] = self._capture(function, z, key[1])
        except CaptureError as error:
            self._refusal = str(error)
            _log.warning("accelerate: no CUDA graphs for this tower, calls are slower: %s", error)
            return function(z)
        captured.replay()
        return tuple(output[:B] for output in captured.outputs)

    def constant(self, name: str, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """These numbers on the device, where graphs read them: [len(values)].

        The same memory for one name and length; it is written where the numbers have changed.
        """
        key = name, len(values), dtype
        held = self._constants.get(key)
        if held is None or held[0] != values:
            with torch.inference_mode(False), torch.no_grad():
                if held is None:
                    tensor = torch.tensor(values, dtype=dtype).to(self.device)
                elif len(values) == 1:  # images of a call: without a wait for the stream
                    tensor = held[1].fill_(values[0])
                else:
                    tensor = held[1].copy_(torch.tensor(values, dtype=dtype))
            held = self._constants[key] = values, tensor
        return held[1]

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Starts work on a stream of its own, a branch of the graph that is captured.

        What it reads must be held, and not written, until the function that is returned is called:
        the stream of the caller waits for the work then.
        """
        if self.device.type != "cuda":
            work()
            return lambda: None
        if self._stream_beside is None:
            self._stream_beside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        current, stream = torch.cuda.current_stream(self.device), self._stream_beside
        stream.wait_stream(current)
        with torch.cuda.stream(stream), workspace.using(self._space_beside):
            work()
        return lambda: current.wait_stream(stream)

    def _capture(self, function: Function, z: Tensor, bucket: int) -> Captured:
        # Not inference tensors: these could not be written to outside of inference mode
        with torch.inference_mode(False), torch.no_grad(), workspace.using(self._space):
            padded = torch.zeros((bucket, *z.shape[1:]), dtype=z.dtype, device=z.device)
            padded[: z.shape[0]].copy_(z)
            captured, self._pool = capture(function, padded, self._pool)
            return captured


class CaptureError(RuntimeError):
    """A function that runs cannot be captured."""


def capture(function: Function, padded: Tensor, pool: Any) -> tuple[Captured, Any]:
    """The graph of function(padded), and the memory pool that it shares with those before it.

    Raises: CaptureError if the function does something that no graph can hold.
    """
    device = padded.device
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        function(padded)  # compiles kernels and allocates what stays
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: what other threads do meanwhile neither fails nor breaks the capture
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            outputs = function(padded)
    except RuntimeError as error:
        raise CaptureError(" ".join(str(error).split())[:300]) from error
    current.wait_stream(side)
    return Captured(graph.replay, padded, outputs), graph.pool()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, this GPU is the current one: replays, streams and events are its own."""
    return torch.cuda.device(device)


def new_event() -> torch.cuda.Event:
    """An event of the current GPU, not recorded yet: waiting for it returns at once."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


_all: "weakref.WeakKeyDictionary[nn.Module, Graphs]" = weakref.WeakKeyDictionary()
"""Neither copied nor pickled with a tower, and freed with it."""
_lock = threading.Lock()


def of(tower: nn.Module, device: torch.device) -> Graphs:
    """The graphs of this tower, to be used in a with statement."""
    with _lock:
        graphs = _all.get(tower)
        if graphs is None or graphs.device != device:
            graphs = _all[tower] = Graphs(tower, device)
        return graphs


def drop(tower: nn.Module) -> None:
    """Forgets the graphs of this tower and gives their memory back."""
    with _lock:
        _all.pop(tower, None)


def bucket_of(B: int) -> int:
    """The smallest bucket that holds B rows."""
    return next(bucket for bucket in BUCKETS if bucket >= B)


def is_plain_call(x: Tensor) -> bool:
    """Whether this call on a GPU asks for numbers and nothing else: no gradients, no autocast, no
    tracing, counting or capturing by the caller, and a batch that has a bucket.
    """
    return (
        0 < x.shape[0] <= BUCKETS[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.cuda.is_current_stream_capturing()
    )
