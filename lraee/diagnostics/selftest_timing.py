"""Times on a GPU: kernels and whole towers beside what a torch user would run there instead.

Protocol of lraee.measurement.timing, read from CUDA events: variants warm up in turn, then rounds
in rotating order; a time is a median with its 20th and 80th percentile, a ratio the median of the
ratios of each round. Kernels are captured into CUDA graphs, so that their rows hold no time of the
host; each call of a graph has weights of its own, as many as fill the tower's, so that nothing is
found in a cache where the tower would not find it. Towers are timed as they are called, and as
graphs.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.operands import Norm, PackedLinear, ProbeHead
from lraee.measurement.timing import MAX_ROUNDS, MIN_ROUNDS, WARM_S, Timing, interleaved, warm_up
from lraee.model.accelerate import accelerate
from lraee.ops.reference import quantize_rows
from lraee.towers.families import image_size
from lraee.zoo.opening import open_model

Input = TypeVar("Input")
Call = Callable[[], object]
Rounds = Callable[[Mapping[str, Call]], dict[str, list[float]]]
"""Seconds of every round of each variant, interleaved."""


@dataclass(frozen=True)
class Tower:
    """An image tower's sizes: L tokens of width D, H heads; E outputs, K classes of a probe."""

    name: str
    L: int
    D: int
    H: int
    layers: int
    E: int
    K: int = 1000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """N and K of the four linears of a block."""
        D = self.D
        return {
            "attn.qkv": (3 * D, D),
            "attn.out": (D, D),
            "mlp.fc1": (4 * D, D),
            "mlp.fc2": (D, 4 * D),
        }

    def copies(self, N: int, K: int) -> int:
        """How many weights of this shape are as large as all of the tower's."""
        return max(1, self.layers * 12 * self.D**2 // (N * K))


B32 = Tower("ViT-B-32", L=50, D=768, H=12, layers=12, E=512)


@dataclass(frozen=True)
class TimeRow:
    """One variant of one shape, per call; `speedup`: how many times faster lraee is.

    `error` is None, or why there is no time.
    """

    kernel: str
    shape: str
    variant: str
    timing: Timing | None
    speedup: float | None
    error: str | None = None


@dataclass(frozen=True)
class Contest:
    """Variants of the same work, ours first; `make` builds them, each running `calls` calls."""

    kernel: str
    shape: str
    calls: int
    make: Callable[[], dict[str, Call]]


def measure(
    device: torch.device, broken: Collection[str], *, quick: bool = False, progress: bool = True
) -> list[TimeRow]:
    """Times every contest whose kernels compute the right thing.

    Args:
      device: a CUDA device.
      broken: kernels that do not.
      quick: a tenth of the time for each.
      progress: show a progress bar.
    """
    budget_s = 0.3 if quick else 3.0

    def rounds(variants: Mapping[str, Call]) -> dict[str, list[float]]:
        return cuda_interleaved(variants, device, budget_s=budget_s)

    result: list[TimeRow] = []
    for contest in tqdm(list(contests(device, B32)), "timings", disable=not progress):
        if contest.kernel in broken or (contest.kernel == "tower" and broken):
            error = "not timed: it does not compute what it is defined to"
            result.append(TimeRow(contest.kernel, contest.shape, "", None, None, error))
        else:
            result += hold(contest, rounds)
    return result


@torch.inference_mode()
def hold(contest: Contest, rounds: Rounds) -> list[TimeRow]:
    """The rows of one contest, or one row that says why it could not be held."""
    kernel, shape = contest.kernel, contest.shape
    try:
        variants = contest.make()
        seconds = rounds(variants)
    except Exception as error:  # the others can be timed all the same
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [TimeRow(kernel, shape, "", None, None, text)]
    ours = seconds[next(iter(variants))]
    rows = []
    for name, each in seconds.items():
        speedup = median(rival / own for rival, own in zip(each, ours, strict=True))
        timing = Timing.of([s / contest.calls for s in each])
        rows.append(TimeRow(kernel, shape, name, timing, speedup))
    return rows


def cuda_interleaved(
    variants: Mapping[str, Call], device: torch.device, *, budget_s: float, warm_s: float = WARM_S
) -> dict[str, list[float]]:
    """Seconds between CUDA events around every round of each variant."""

    def finished(run: Call) -> Call:
        def call() -> None:
            run()
            torch.cuda.synchronize(device)

        return call

    runs = [finished(run) for run in variants.values()]
    count = warm_up(runs, budget_s, warm_s, least=MIN_ROUNDS, most=MAX_ROUNDS)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(count):
        for name in order:
            start, end = _event(), _event()
            start.record()
            variants[name]()
            end.record()
            events[name].append((start, end))
        order.append(order.pop(0))
    torch.cuda.synchronize(device)
    return {name: [s.elapsed_time(e) / 1e3 for s, e in each] for name, each in events.items()}


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cpu_interleaved(variants: Mapping[str, Call]) -> dict[str, list[float]]:
    """The same by the CPU's clock, as short as can be: for tests of this file."""
    return interleaved(variants, budget_s=0.0, warm_s=0.0)


def captured(call: Call, device: torch.device) -> Call:
    """A replay of the CUDA graph of one call; the call itself on other devices."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and allocates the workspace of this stream
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def contests(device: torch.device, tower: Tower) -> Iterator[Contest]:
    """Linears at batch 1 and 32, attention and probe, then the whole tower."""
    for batch in (1, 32):
        for name, (N, K) in tower.linears.items():
            yield linear_contest(device, tower, name, batch * tower.L, N, K)
    for batch in (1, 32):
        yield attention_contest(device, tower, batch)
        yield probe_contest(device, tower, batch)
    for batch in (1, 8, 32):
        yield tower_contest(device, lambda: open_tower(tower), batch)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float16, device=device)


def linear_contest(
    device: torch.device, tower: Tower, name: str, M: int, N: int, K: int
) -> Contest:
    """int8_linear with zero points, bias and float16 out; cuBLAS float16; torch's int8 product.

    torch._int_mm gives int32 and has no epilogue.
    """
    calls = tower.copies(N, K)

    def make() -> dict[str, Call]:
        x, b = _normal(device, M, K), _normal(device, N)
        x_q = quantize_rows(x, False)
        weights = [_normal(device, N, K) for _ in range(calls)]
        layers = [int8_layer(w, b.float()) for w in weights]

        def ours(layer: PackedLinear) -> Tensor:
            y: Tensor = int8_linear(*x_q, layer, out_dtype=torch.float16)
            return y

        variants = {
            "lraee int8": _in_turn(ours, layers),
            "torch float16": _in_turn(lambda w: F.linear(x, w, b), weights),
            "torch._int_mm": _in_turn(lambda layer: torch._int_mm(x_q[0], layer.w.t()), layers),
        }
        return {name: captured(run, device) for name, run in variants.items()}

    return Contest("int8_linear", f"{tower.name} {name} M={M} N={N} K={K}", calls, make)


def _in_turn(function: Callable[[Input], Tensor], inputs: list[Input]) -> Call:
    """Calls function with each input, keeps no result but the last, and returns that."""

    def call() -> Tensor:
        for one in inputs[:-1]:
            function(one)
        return function(inputs[-1])

    return call


def int8_layer(w: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """A quantized weight as the CUDA kernels read it."""
    w_q, w_scale, _ = quantize_rows(w, True)
    return PackedLinear(w_q, w_scale, w_q.sum(1, dtype=torch.int32), bias)


def attention_contest(device: torch.device, tower: Tower, batch: int) -> Contest:
    """int8_attention, and torch's scaled_dot_product_attention in float16."""
    L, D, H = tower.L, tower.D, tower.H

    def make() -> dict[str, Call]:
        inputs = [_normal(device, batch, L, 3 * D) for _ in range(tower.layers)]

        def theirs(qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(batch, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, L, D)

        variants: dict[str, Call] = {
            "lraee int8": _in_turn(lambda qkv: int8_attention(qkv, H), inputs),
            "torch SDPA float16": _in_turn(theirs, inputs),
        }
        return {name: captured(run, device) for name, run in variants.items()}

    return Contest("int8_attention", f"B={batch} L={L} H={H} d={D // H}", tower.layers, make)


def probe_contest(device: torch.device, tower: Tower, batch: int) -> Contest:
    """exit_probe with a two-layer head on mean and class token, and its steps in torch float16."""
    L, D, E, K = tower.L, tower.D, tower.E, tower.K
    P, H = 2 * D, 512

    def make() -> dict[str, Call]:
        z = _normal(device, batch, L, D)
        gamma, beta, gate = (_normal(device, n).float() for n in (P, P, 4))
        w1 = _normal(device, H, P) / math.sqrt(P)
        w2 = _normal(device, E, H) / math.sqrt(H)
        classes = F.normalize(_normal(device, K, E).float(), dim=1).half()
        head = ProbeHead(Norm(gamma, beta), int8_layer(w1), int8_layer(w2), classes, 30.0, gate)
        half = (gamma.half(), beta.half(), w1, w2, classes, gate.half())
        variants: dict[str, Call] = {
            "lraee int8": lambda: exit_probe(z, head),
            "torch float16": lambda: float_probe(z, *half),
        }
        return {name: captured(run, device) for name, run in variants.items()}

    return Contest("exit_probe", f"B={batch} L={L} P={P} H={H} E={E} K={K}", 1, make)


def float_probe(
    z: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, w2: Tensor, classes: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, class and score of an exit, as one would write them in torch."""
    patches = z[:, 1:]
    recorded = torch.cat([patches.mean(1), z[:, 0]], 1)
    h = F.layer_norm(recorded, gamma.shape, gamma, beta, 1e-5)
    embedding = F.linear(F.gelu(F.linear(h, w1)), w2)
    p = torch.softmax(30.0 * F.normalize(embedding, dim=-1) @ classes.T, dim=-1)
    top = p.topk(2, dim=-1)
    variance = patches.var(1, correction=0).sum(-1)
    margin = top.values[:, 0] - top.values[:, 1]
    features = torch.stack([top.values[:, 0], margin, variance, torch.ones_like(margin)], 1)
    return embedding, top.indices[:, 0], torch.sigmoid(features @ gate)


def open_tower(tower: Tower) -> nn.Module:
    """The tower in float16, random weights: time does not depend on them."""
    visual = open_model(tower.name, may_be_random=True).model.get_submodule("visual")
    return visual.half()


def _compiled(module: nn.Module) -> Call:
    """For one batch size: a graph for any would be slower."""
    return torch.compile(module, dynamic=False)


def tower_contest(
    device: torch.device,
    opened: Callable[[], nn.Module],
    batch: int,
    compiled: Callable[[nn.Module], Call] = _compiled,
) -> Contest:
    """The whole image tower in int8 and float16, called and as CUDA graphs; and torch.compile."""

    def make() -> dict[str, Call]:
        base: Any = opened().to(device)
        fast: Any = accelerate(base)
        images = _normal(device, batch, 3, *image_size(base))
        quick: Any = compiled(base)
        return {
            "lraee int8": lambda: fast(images),
            "torch float16": lambda: base(images),
            "torch float16, compiled": lambda: quick(images),
            "lraee int8, graph": captured(lambda: fast(images), device),
            "torch float16, graph": captured(lambda: base(images), device),
        }

    return Contest("tower", f"batch {batch}", 1, make)
