"""The child of first_use: small products by one kernel family and by the simple kernel.

    python -m lraee.kernels.first_use_child persistent 0

Prints "passed" last, or the first product that differs. Ends itself by SIGALRM should its parent
have ended before it.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lraee.kernels import device as devices
from lraee.kernels import first_use
from lraee.kernels.archs import Arch
from lraee.kernels.families import gluon_config, legal_gluon, persistent_config
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.operands import PackedLinear
from lraee.kernels.tiling import Config, Shape

SHAPES = ((1, 64, 64), (300, 192, 768), (2000, 2304, 768), (1500, 768, 3072))
"""One tile, ragged ones, several a program, and a long K."""
ROUNDS = 5
"""A race need not show the first time."""
SIMPLE = Config(64, 64, 64, num_warps=4, num_stages=3)

ConfigOf = Callable[[Shape, bool], Config | None]
"""A family's config for a shape, without or with a residual; None where it has none."""


def operands(M: int, N: int, K: int, device: torch.device) -> tuple[tuple[Tensor, ...], PackedLinear, Tensor]:  # fmt: skip  # noqa: E501
    """x with its scales and zero points, a linear with layer scale, and a residual."""
    source = torch.Generator().manual_seed(M + N + K)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(device)

    def int8(rows: int) -> Tensor:
        values = torch.randint(-128, 128, (rows, K), generator=source, dtype=torch.int8)
        return values.to(device)

    w = int8(N)
    w_sum = w.sum(1, dtype=torch.int32)
    x_zero = torch.randint(-128, 128, (M,), generator=source, dtype=torch.int32).to(device)
    linear = PackedLinear(w, floats(N).abs() * 1e-3, w_sum, floats(N), floats(N))
    return (int8(M), floats(M).abs() * 1e-2, x_zero), linear, floats(M, N).half()


def difference(
    config_of: ConfigOf,
    device: torch.device,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    rounds: int = ROUNDS,
) -> str | None:
    """The first product of a family that has other bits than the simple kernel's, in words.

    Args:
      config_of: of the family.
    """
    for M, N, K in shapes:
        x, linear, residual = operands(M, N, K, device)
        for activation, added in (("none", None), ("gelu", None), ("none", residual)):
            config = config_of(Shape(M, N, K), added is not None)
            if config is None:
                continue
            plain = linear if added is not None else linear._replace(layer_scale=None)
            options: dict[str, Any] = {
                "residual": added,
                "activation": activation,
                "out_dtype": torch.float16,
            }
            expected = int8_linear(*x, plain, config=SIMPLE, **options)
            for _ in range(rounds):
                actual = int8_linear(*x, plain, config=config, **options)
                wrong = int((actual.view(torch.int16) != expected.view(torch.int16)).sum())
                if wrong:
                    kind = f"{activation}{'' if added is None else ' with a residual'}"
                    return f"{wrong} of {M} x {N} values at K = {K} ({kind}) have other bits"
    return None


def configs_of(family: str, arch: Arch) -> ConfigOf:
    """The configs that a family is checked in on this architecture."""

    def persistent(shape: Shape, has_residual: bool) -> Config:
        config: Config = persistent_config(arch, has_residual=has_residual)
        return config

    def gluon(shape: Shape, has_residual: bool) -> Config | None:
        config: Config = gluon_config(shape)
        return None if has_residual or not legal_gluon(config, shape, arch) else config

    return {"persistent": persistent, "gluon": gluon}[family]


def main(family: str, index: int) -> None:
    """Command line."""
    if hasattr(signal, "alarm"):
        signal.alarm(2 * first_use.PATIENCE_S)
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    configs = configs_of(family, devices.arch(device))
    sys.stdout.write(f"{difference(configs, device) or first_use.PASSED}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
