"""Measures the legal configs of int8_linear on this GPU and prints rows for kernels/measured.py.

    python -m bench.tune_int8_linear                      layers of ViT-B/32, ViT-B/16 and ViT-L/14
    python -m bench.tune_int8_linear --layer 1600 3072 768

Each config is compared with torch's exact product before it is timed. Nothing is tuned at run time:
the rows printed here are pasted into the table, with the GPU and the date that they carry.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date

import torch

from bench.shapes import B16, B32, L14
from lraee.diagnostics.selftest_timing import captured, cuda_interleaved
from lraee.kernels.archs import Arch
from lraee.kernels.configs import Config, Shape, legal, pick, predicted_us
from lraee.kernels.device import arch as arch_of
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.operands import PackedLinear
from lraee.ops import reference

COPIES = 12
"""Weights of one shape, as many as ViT-B has blocks."""

Timer = Callable[[Callable[[], object]], float]
"""Median microseconds of a call."""


@dataclass(frozen=True)
class Measured:
    """A config, its time, and the time the cost model gave it."""

    config: Config
    us: float
    predicted_us: float


def space(shape: Shape, arch: Arch) -> Iterator[Config]:
    """Every legal config worth a try for this shape."""
    for m, n, k, warps, stages, split in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4), (1, 2, 4)
    ):
        config = Config(m, n, k, warps, stages, split)
        is_wasteful = m >= 32 and m >= 2 * shape.M
        if not is_wasteful and legal(config, shape, arch):
            yield config


def cuda_timer(call: Callable[[], object]) -> float:
    """Median microseconds on the GPU, without the host: the call is replayed as a CUDA graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    seconds = cuda_interleaved({"": captured(call, device)}, device, budget_s=0.02, warm_s=0.01)
    return 1e6 * statistics.median(seconds[""])


def tune(
    shape: Shape, device: torch.device, arch: Arch, timer: Timer, most: int | None = None
) -> list[Measured]:
    """Times the legal configs of one shape, best first.

    Each call goes through COPIES weights, so that none is found in a cache where it would not lie
    in a tower.

    Args:
      shape: M, N, K of the layer.
      device: where to run.
      arch: its architecture.
      timer: median microseconds of a call.
      most: only that many configs, those that the cost model likes best; None for all.
    Raises: AssertionError if a config gives other numbers than the definition.
    """
    M, N, K = shape.M, shape.N, shape.K
    source = torch.Generator().manual_seed(0)

    def int8(rows: int) -> torch.Tensor:
        values = torch.randint(-127, 128, (rows, K), generator=source, dtype=torch.int8)
        return values.to(device)

    x_q, weights = int8(M), [int8(N) for _ in range(COPIES)]
    x_scale = torch.rand(M, generator=source).to(device)
    w_scale = torch.rand(N, generator=source).to(device)
    layers = [PackedLinear(w, w_scale, w.sum(1, dtype=torch.int32)) for w in weights]
    expected = reference.int8_linear(x_q, x_scale, None, layers[-1])
    configs = sorted(space(shape, arch), key=lambda one: predicted_us(one, shape, arch))[:most]
    measured = []
    for config in configs:

        def call(config: Config = config) -> torch.Tensor:
            results = [int8_linear(x_q, x_scale, None, layer, config=config) for layer in layers]
            return results[-1]

        assert torch.equal(call(), expected), f"{config} gives other numbers than the definition"
        us = timer(call) / COPIES
        measured.append(Measured(config, us, predicted_us(config, shape, arch)))
    return sorted(measured, key=lambda one: one.us)


def row(config: Config) -> str:
    """The config as a row of kernels/measured.py, its largest M left out."""
    tile = f"{config.block_m}, {config.block_n}, {config.block_k}"
    return f"({tile}, {config.num_warps}, {config.num_stages}, {config.split_k})"


def report(shape: Shape, measured: list[Measured], arch: Arch, gpu: str, keep: int = 3) -> str:
    """The best rows of one shape, and what the table's choice costs against the best."""
    lines = [f"# M={shape.M} N={shape.N} K={shape.K}, {gpu}, {date.today()}"]
    for one in measured[:keep]:
        lines.append(f"{row(one.config)}  # {one.us:.1f} us, model {one.predicted_us:.1f} us")
    chosen = pick(shape, arch)
    times = [one.us for one in measured if one.config == chosen]
    if times:
        ratio = times[0] / measured[0].us
        lines.append(f"# pick: {row(chosen)} {times[0]:.1f} us, {ratio:.2f}x the best")
    middle = statistics.median(one.us / one.predicted_us for one in measured)
    lines.append(f"# measured / model, median: {middle:.2f}")
    return "\n".join(lines)


def layers() -> list[Shape]:
    """Layers of real towers at batch 1, 8 and 32, each shape once."""
    shapes = {
        Shape(batch * tower.L, linear.N, linear.K): None
        for tower in (B32, B16, L14)
        for linear in tower.linears
        for batch in (1, 8, 32)
    }
    return list(shapes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, nargs=3, metavar=("M", "N", "K"))
    parser.add_argument("--most", type=int, default=64, help="configs per layer, best predicted")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_int8_linear: needs an NVIDIA GPU, torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    arch, gpu = arch_of(device), torch.cuda.get_device_name(device)
    for shape in [Shape(*options.layer)] if options.layer else layers():
        measured = tune(shape, device, arch, cuda_timer, options.most)
        print(report(shape, measured, arch, gpu), flush=True)


if __name__ == "__main__":
    main()
