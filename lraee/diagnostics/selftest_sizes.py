"""What a self-test runs on: one launch, where, and which shapes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lraee.kernels.archs import Arch

Difference = Callable[[], str | None]


@dataclass(frozen=True)
class Case:
    """One launch; `difference` says where it first differs from the definition, or None."""

    kernel: str
    config: str
    shape: str
    difference: Difference


@dataclass(frozen=True)
class Target:
    """Where the kernels run. The CPU stands for Triton's interpreter, with configs of `arch`."""

    device: torch.device
    arch: Arch


@dataclass(frozen=True)
class Sizes:
    """Shapes to run on.

    Args:
      rows: M of linears and row-wise kernels.
      layers: N, K of linears.
      widths: K of row-wise kernels.
      attention: B, L, H, d.
      probes: B, L, D, H (None: one layer), E, K.
    """

    rows: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    attention: tuple[tuple[int, int, int, int], ...]
    probes: tuple[tuple[int, int, int, int | None, int, int], ...]


FULL = Sizes(
    rows=(1, 50, 197, 257),
    # Off every block and alignment; whole blocks; 16 divides K, no block does
    layers=((33, 77), (768, 768), (72, 1040)),
    widths=(33, 768, 4097),
    attention=(
        (2, 1, 3, 64), (2, 50, 3, 64), (1, 77, 2, 33), (1, 197, 2, 64), (1, 257, 2, 80),
        (1, 330, 1, 64),
    ),
    probes=(
        (1, 50, 768, 768, 512, 300), (17, 50, 768, None, 512, 70), (2, 197, 96, 130, 65, 7),
        (1, 257, 1024, 512, 768, 40), (3, 10, 33, 48, 20, 1),
    ),
)  # fmt: skip
QUICK = Sizes(
    rows=(1, 50),
    layers=((33, 77), (72, 1040)),
    widths=(33, 768),
    attention=((2, 50, 3, 64), (1, 257, 1, 64)),
    probes=((1, 50, 768, 512, 512, 300), (17, 50, 96, None, 65, 70)),
)
TINY = Sizes(
    rows=(1, 17),
    layers=((33, 77), (20, 1040)),
    widths=(33,),
    attention=((1, 17, 2, 8), (1, 65, 1, 8)),
    probes=((1, 10, 64, 48, 32, 70), (3, 4, 33, None, 20, 7)),
)
"""For the interpreter, which multiplies about 1e9 integers a second."""
