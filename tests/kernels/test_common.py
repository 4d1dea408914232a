"""Activations of the kernels in the interpreter: the bits of the C++ operators of the CPU."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lraee.kernels import gates
from lraee.kernels.common import fused_multiply_add
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.operands import PackedLinear
from lraee.ops import backend
from tests.support import assert_same, generator

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and Inf
GATES_H = Path(__file__).parents[2] / "csrc" / "cpu" / "numerics" / "gates.h"
ACTIVATIONS = ["none", "gelu", "gelu_tanh", "quick_gelu"]
TILE = Config(16, 128, 32, num_warps=4, num_stages=2)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)
    tl.store(out_ptr + offs, fused_multiply_add(x, y, z))


def random_bits(size: int, seed: int) -> Tensor:
    """float32 of any bits: denormal, huge, infinite and NaN among them."""
    bits = torch.randint(-(2**31), 2**31, (size,), generator=generator(seed), dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def exact_sum(x: Tensor, y: Tensor, z: Tensor) -> np.ndarray:
    """x * y + z in numpy's extended float of 64 bits, then in float32.

    It holds the ties below; of random bits too few come near a tie to be rounded twice.
    """
    wide = [np.asarray(t).astype(np.longdouble) for t in (x, y, z)]
    return (wide[0] * wide[1] + wide[2]).astype(np.float32)


def test_fused_multiply_add_rounds_once() -> None:
    """Random bits, and sums of which two roundings would give another float."""
    size = 1 << 14
    x, y, z = (random_bits(size, seed) for seed in range(3))
    # (1 + a 2^-12) (1 + b 2^-12) with odd a, b is a tie of float32, which z breaks; float64 has
    # no room for z beside it
    odd = 2.0 * torch.arange(size // 2) + 1
    x[: size // 2] = 1.0 + odd % 4096 * 2.0**-12
    y[: size // 2] = 1.0 + odd % 97 * 2.0**-12
    z[: size // 2] = torch.where(torch.arange(size // 2) % 2 == 0, 1.0, -1.0) * 2.0**-60
    out = torch.empty(size)
    _fma_kernel[(1,)](x, y, z, out, SIZE=size)
    assert_same(out, torch.from_numpy(exact_sum(x, y, z)))
    twice = (x.double() * y.double() + z.double()).float()
    for other in (x * y + z, twice):
        assert (out != other)[: size // 2].sum() > size // 16


def test_tables_are_those_of_the_cpu() -> None:
    text = GATES_H.read_text()
    for name, table, clamp, squarings in (
        ("kGeluGate", gates.GELU, gates.GELU_CLAMP, gates.GELU_SQUARINGS),
        ("kGeluTanhGate", gates.GELU_TANH, gates.GELU_CLAMP, gates.GELU_SQUARINGS),
        ("kQuickGeluGate", gates.QUICK_GELU, gates.QUICK_GELU_CLAMP, gates.QUICK_GELU_SQUARINGS),
    ):
        match = re.search(rf"Gate<(\d+), (\d+)> {name}{{(.*?)}}}};", text, re.DOTALL)
        assert match is not None, name
        numbers = re.findall(r"-?(?:0x[0-9a-f.]+p[+-]\d+|\d+\.\d+)", match[3])
        values = [float.fromhex(n) if "x" in n else float(n) for n in numbers]
        assert values == [clamp, *table] and int(match[2]) == squarings, name
        assert all(float(np.float32(value)) == value for value in table)
        assert len(table) == int(match[1]) + 1


def through(y: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(y) by the kernel in the interpreter and by the C++ operator: y comes as the bias.

    The product is zero times a scale, and 0 + y = y but for the sign of a zero, which layer_scale
    and a scale of -0 show: see the test.
    """
    (N,) = y.shape
    x_q = torch.zeros(1, 4, dtype=torch.int8)
    w_q = torch.zeros(N, 4, dtype=torch.int8)
    x = (x_q, torch.full((1,), -1.0), None)
    scale, total = torch.ones(N), torch.zeros(N, dtype=torch.int32)
    actual = int8_linear(*x, PackedLinear(w_q, scale, total, y), activation=activation, config=TILE)
    cpp = backend.operators("cpu")
    packed = PackedLinear(cpp.pack_weight(w_q)[0], scale, total, y)
    return actual, cpp.int8_linear(*x, packed, activation=activation)


def sweep() -> Tensor:
    """Dense where the gates bend; every exponent; zeros of both signs, denormals, Inf, NaN."""
    dense = torch.linspace(-12.0, 12.0, 24_001)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    powers = torch.cat([2.0**exponents, -(2.0**exponents), 1.37 * 2.0 ** exponents[:-1]]).float()
    near = torch.tensor([5.5, 9.0, -5.5, -9.0])
    edges = [torch.nextafter(near, torch.tensor(s)) for s in (-20.0, 20.0)]
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.17e-38, -1.17e-38, inf, -inf, nan, 3.4e38])
    return torch.cat([dense, powers, near, *edges, special, random_bits(4096, 9)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_linear_has_the_bits_of_the_cpu(activation: str) -> None:
    y = sweep()
    actual, expected = through(y, activation)
    assert_same(actual, expected, activation=activation)
    zeros = (y == 0).nonzero().flatten()
    signs = [torch.signbit(t[0, zeros]) for t in (actual, expected, y[None])]
    assert torch.equal(signs[0], signs[1])
    assert signs[2].any() and torch.equal(signs[0], signs[2])  # -0.0 stays -0.0
