"""Instructions a value of the row-wise kernels, read from machine code; compiles without a GPU.

    python -m bench.row_instructions [--arch 80 90]

A program is straight-line code, so its instructions, times 32 a warp, over the values of its rows
are what a value takes; the rarely taken ways of exact divisions are counted too. Fails above
MOST_A_VALUE.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_matrix import machine_code
from bench.launches import Launch, launches_of, meta
from lraee.kernels.archs import ARCHS
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows

MOST_A_VALUE = 32
ROWS = 6304
WIDTHS = (768, 1024, 1152, 1280, 3072, 4096, 4304)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")


def cells() -> Iterator[tuple[str, Launch, int]]:
    """(name, launch, values of a program) of each kernel and width of real towers."""
    half = torch.float16
    for D in WIDTHS:
        x = meta(ROWS, D, dtype=half)
        (launch,) = launches_of(partial(quantize_rows, x, False))
        yield f"quantize_rows {D}", launch, D
    for D in WIDTHS[:4]:
        x, gamma = meta(ROWS, D, dtype=half), meta(D, dtype=half)
        (launch,) = launches_of(partial(layer_norm_quantize, x, gamma, gamma, 1e-5, False))
        yield f"layer_norm_quantize {D}", launch, D


def instructions(launch: Launch, capability: int) -> int:
    """Instructions of one warp, padding behind the last exit not counted."""
    code = machine_code(launch, ARCHS[capability])
    names = _INSTRUCTION.findall(code.sass)
    return sum(name not in ("NOP", "BRA") for name in names)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=list(ARCHS))
    arguments = parser.parse_args()
    wrong = 0
    for capability in arguments.arch:
        for name, launch, values in cells():
            rows = int(launch.constants["BLOCK_M"])  # type: ignore[call-overload]
            warps = launch.options["num_warps"]
            each = instructions(launch, capability) * 32 * warps / (rows * values)
            wrong += each > MOST_A_VALUE
            print(f"sm_{capability} {name} w{warps}: {each:.1f} instructions a value", flush=True)
    if wrong:
        sys.exit(f"{wrong} kernels take more than {MOST_A_VALUE} instructions a value")


if __name__ == "__main__":
    main()
