"""Instructions a value of the row-wise kernels, read from machine code; compiles without a GPU.

    python -m bench.row_instructions [--arch 80 90] [--width 768]

A program is straight-line code, so its instructions, times 32 a warp, over the values of its rows
are what a value takes. The rarely taken ways of exact divisions, behind the last exit, are counted
too. Fails above MOST_A_VALUE.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from functools import partial

import torch

from bench.launches import Launch, launches_of, meta
from bench.machine_code import machine_code
from lraee.kernels.archs import ARCHS
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.quantize_rows import quantize_rows

MOST_A_VALUE = 32
ROWS = 6304
NORM_WIDTHS = (768, 1024, 1152, 1280)
WIDTHS = (*NORM_WIDTHS, 3072, 4096, 4304)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")


def cells() -> Iterator[tuple[str, int, Launch]]:
    """(kernel, width of a row, launch) of the widths of real towers, as a large batch has them."""
    for D in WIDTHS:
        x, gamma = meta(ROWS, D, dtype=torch.float16), meta(D, dtype=torch.float16)
        for launch in launches_of(partial(quantize_rows, x, False)):
            yield launch.name, D, launch
        if D in NORM_WIDTHS:
            norm = partial(layer_norm_quantize, x, gamma, gamma, 1e-5, False)
            yield "layer_norm_quantize", D, launches_of(norm)[0]


def instructions(launch: Launch, capability: int) -> int:
    """Instructions of a warp; NOPs that fill the last line are none."""
    names = _INSTRUCTION.findall(machine_code(launch, ARCHS[capability]).sass)
    return sum(name != "NOP" for name in names)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=list(ARCHS))
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS), choices=WIDTHS)
    arguments = parser.parse_args()
    wrong = 0
    for capability in arguments.arch:
        for name, width, launch in cells():
            if width not in arguments.width:
                continue
            rows, warps = launch.constants["BLOCK_M"], launch.options["num_warps"]
            assert isinstance(rows, int)
            each = instructions(launch, capability) * 32 * warps / (rows * width)
            wrong += each > MOST_A_VALUE
            program = f"{rows} rows, {warps} warps"
            print(f"sm_{capability} {name} {width} ({program}): {each:.1f}", flush=True)
    if wrong:
        sys.exit(f"{wrong} kernels take more than {MOST_A_VALUE} instructions a value")


if __name__ == "__main__":
    main()
