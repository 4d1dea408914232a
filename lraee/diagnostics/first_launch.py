"""A small product of one kernel family beside the simple kernel, for a process of its own.

    python -m lraee.diagnostics.first_launch FAMILY cuda|interpreter

Ends with 0 where the bits are the same; a kernel that hangs is ended by the process that waits.
"""

import sys

import torch

from lraee.diagnostics import product_families as families
from lraee.diagnostics import tuning
from lraee.diagnostics.selftest import find_target
from lraee.diagnostics.tuned_layers import Epilogue, Operands, TunedLayer
from lraee.kernels.configs import Shape

ROWS = (1, 77, 300)
LAYER = TunedLayer(320, 768, Epilogue("gelu", has_residual=True, has_layer_scale=True))
SMALL, FEW_ROWS = TunedLayer(96, 160, LAYER.epilogue), (17,)
"""For the interpreter."""


def main(name: str, device: str) -> None:
    """Exits with one line where a product differs."""
    target = find_target("cuda" if device == "cuda" else "interpreter")
    layer, rows = (LAYER, ROWS) if device == "cuda" else (SMALL, FEW_ROWS)
    family = next(one for one in families.FAMILIES if one.name == name)
    for M in rows:
        shape = Shape(M, layer.N, layer.K)
        given = Operands.of(layer, M, 1, torch.float16, target.device)
        expected = tuning.product(given, families.present_pick(shape, target, layer.epilogue.name))
        for config in family.candidates(shape, target.arch, 1):
            y = tuning.product(given, config)
            if not torch.equal(y, expected):
                sys.exit(f"{name} {families.numbers(config)}: other bits at {shape}")


if __name__ == "__main__":
    main(*sys.argv[1:])
