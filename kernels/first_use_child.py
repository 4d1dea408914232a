"""The child of first_use: small products by one kernel family and by the simple kernel.

    python -m lraee.kernels.first_use_child persistent 0

Prints "passed" last, or the first product that differs. Ends itself by SIGALRM should its parent
have ended before it.
"""

import signal
import sys
from typing import Any

import torch
from torch import Tensor

from lraee.kernels import device as devices
from lraee.kernels import first_use
from lraee.kernels.families import persistent_config
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.operands import PackedLinear
from lraee.kernels.tiling import Config

SHAPES = ((1, 64, 64), (300, 192, 768), (2000, 2304, 768), (1500, 768, 3072))
"""One tile, ragged ones, several a program, and a long K."""
ROUNDS = 5
"""A race need not show the first time."""
SIMPLE = Config(64, 64, 64, num_warps=4, num_stages=3)


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
    config_of: dict[bool, Config],
    device: torch.device,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    rounds: int = ROUNDS,
) -> str | None:
    """The first product of a family that has other bits than the simple kernel's, in words.

    Args:
      config_of: a config of the family without a residual and with one.
    """
    for M, N, K in shapes:
        x, linear, residual = operands(M, N, K, device)
        for activation, added in (("none", None), ("gelu", None), ("none", residual)):
            plain = linear if added is not None else linear._replace(layer_scale=None)
            options: dict[str, Any] = {
                "residual": added,
                "activation": activation,
                "out_dtype": torch.float16,
            }
            expected = int8_linear(*x, plain, config=SIMPLE, **options)
            for _ in range(rounds):
                config = config_of[added is not None]
                actual = int8_linear(*x, plain, config=config, **options)
                wrong = int((actual.view(torch.int16) != expected.view(torch.int16)).sum())
                if wrong:
                    kind = f"{activation}{'' if added is None else ' with a residual'}"
                    return f"{wrong} of {M} x {N} values at K = {K} ({kind}) have other bits"
    return None


def main(family: str, index: int) -> None:
    """Command line."""
    if hasattr(signal, "alarm"):
        signal.alarm(2 * first_use.PATIENCE_S)
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    assert family == "persistent", family
    arch = devices.arch(device)
    configs = {has: persistent_config(arch, has_residual=has) for has in (False, True)}
    sys.stdout.write(f"{difference(configs, device) or first_use.PASSED}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
