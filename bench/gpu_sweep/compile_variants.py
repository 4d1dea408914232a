"""Compiles a share of all variants, into Triton's cache where there is a GPU.

    python -m bench.gpu_sweep.compile_variants --shard 0/15
    python -m bench.gpu_sweep.compile_variants --shard 0/1 --dry     # a few, for sm_90, no GPU

With a GPU, Triton's own launcher compiles for tensors that have no memory, so that what it puts
into the cache is what a launch looks for. Writes one line of JSON.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.block_launches import block_launches, probe_launches
from bench.launches import ALIGNMENT, Launch, launches_of, meta, meta_linear
from bench.machine_code import compile_cell
from bench.shapes import B16, B32, L14
from lraee.diagnostics.product_families import FAMILIES
from lraee.kernels import device
from lraee.kernels.archs import ARCHS, Arch
from lraee.kernels.configs import Config, Shape
from lraee.kernels.int8_linear import int8_linear

MOST = 18
DRY_ARCH = ARCHS[90]
BATCHES = (1, 8, 32, 128)
EPILOGUES = (("none", False), ("none", True), ("gelu", False))
ERRORS = (CompilationError, OutOfResources, PTXASError, RuntimeError)


def product_launch(shape: Shape, activation: str, has_residual: bool, config: Config) -> Launch:
    """One product as towers have it."""
    M, N, K = shape.M, shape.N, shape.K
    half = torch.float16
    x = (meta(M, K, dtype=torch.int8), meta(M), meta(M, dtype=torch.int32))
    residual = meta(M, N, dtype=half) if has_residual else None
    call = partial(
        int8_linear, *x, meta_linear(N, K), residual=residual, activation=activation,
        out_dtype=half, config=config,
    )  # fmt: skip
    return launches_of(call)[0]


def variants(arch: Arch, most: int) -> Iterator[Launch]:
    """Blocks and probes as they run, then the candidates of every product."""
    for tower, batch in itertools.product((B32, B16, L14), BATCHES):
        yield from block_launches(tower, batch, arch)
        yield from probe_launches(tower, batch, has_class_token=True)
    for tower, batch in itertools.product((B32, B16, L14), BATCHES):
        for linear, (activation, has_residual) in zip(
            tower.linears, (EPILOGUES[0], EPILOGUES[1], EPILOGUES[2], EPILOGUES[1]), strict=True
        ):
            shape = Shape(batch * tower.L, linear.N, linear.K)
            for family in FAMILIES:
                for config in family.candidates(shape, arch, most, adds=has_residual):
                    yield product_launch(shape, activation, has_residual, config)


def distinct(launches: Iterable[Launch]) -> Iterator[Launch]:
    """Each that Triton would compile to another kernel, once."""
    keys = set()
    for launch in launches:
        kinds = [_kind(value) for value in launch.arguments.values()]
        key = repr((launch.name, launch.options, launch.constants, kinds))
        if key not in keys:
            keys.add(key)
            yield launch


def _kind(value: object) -> object:
    """What Triton specialises an argument by."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return (value == 1, value % ALIGNMENT == 0) if isinstance(value, int) else type(value)


def warm(launch: Launch) -> None:
    """Compiles into the cache what a launch with these arguments looks for."""
    launch.kernel.warmup(
        *launch.arguments.values(), grid=launch.grid, enable_fp_fusion=False, **launch.constants,
        **launch.options,
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--dry", action="store_true", help="three variants, no GPU")
    options = parser.parse_args()
    index, count = map(int, options.shard.split("/"))
    arch = DRY_ARCH if options.dry else device.arch(torch.device("cuda", 0))
    every = distinct(variants(arch, 1 if options.dry else MOST))
    chosen: Iterator[Launch] = itertools.islice(every, index, None, count)
    if options.dry:
        kinds = {launch.name: launch for launch in itertools.islice(chosen, 7)}
        chosen = iter([kinds["quantize_rows" if "quantize_rows" in kinds else "int8_linear"]])
    compiled, failures = 0, []
    for launch in chosen:
        try:
            if options.dry:
                compile_cell(launch, arch)
            else:
                warm(launch)
            compiled += 1
        except ERRORS as error:
            failures.append(f"{launch.name} {launch.options}: {str(error)[:100]}")
    print(json.dumps({"compiled": compiled, "failures": failures[:20]}))


if __name__ == "__main__":
    main()
