"""gated_quantize in the interpreter: bits of the definition but for the activation."""

import itertools

import pytest
import torch

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned, poisoned_all
from lraee.diagnostics.selftest_inputs import TYPES, generator, rows_with_extremes
from lraee.kernels.gated_quantize import gated_quantize
from lraee.kernels.row_configs import RowConfig
from lraee.ops import reference
from tests.support import EPS32, assert_same, assert_within

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and Inf
SHAPES = [(1, 1), (3, 5), (17, 77), (11, 130), (5, 64), (12, 33)]


@pytest.mark.parametrize("kind", ["plain", "layer_norm", "rms_norm"])
def test_bits_of_the_definition(kind: str) -> None:
    for seed, ((M, H), dtype) in enumerate(itertools.product(SHAPES, TYPES)):
        x = rows_with_extremes(M, 2 * H, seed).to(dtype)
        gamma, beta = torch.randn(2, H, generator=generator(seed)).unbind()
        norm = {"plain": [], "layer_norm": [gamma, beta, 1e-5], "rms_norm": [gamma, None, 1e-6]}
        with guarded_outputs():
            actual = gated_quantize(
                poisoned(x, row_pad=seed % 3), "none", *poisoned_all(norm[kind]),
                config=RowConfig(4 if seed % 2 else 1, num_warps=4),
            )  # fmt: skip
        expected = reference.gated_quantize(x, "none", *norm[kind])
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, M=M, H=H, seed=seed)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations(activation: str) -> None:
    """Each implementation is within half of a step of the second term, and 16 roundings."""
    x = torch.randn(9, 2 * 100, generator=generator(4)) * 3

    def product(terms: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x_q, x_scale, x_zero, r_q, r_scale = (t.double() for t in terms)
        return (x_q - x_zero[:, None]) * x_scale[:, None] + r_q * r_scale[:, None]

    terms = reference.gated_quantize(x, activation)
    bound = terms[4].double()[:, None] * 1.01 + 16 * EPS32 * (1 + x[:, 100:].abs().double()) * 10
    assert_within(product(gated_quantize(x, activation)), product(terms), bound)


def test_no_rows() -> None:
    assert [t.shape[0] for t in gated_quantize(torch.empty(0, 8), "silu")] == [0] * 5
