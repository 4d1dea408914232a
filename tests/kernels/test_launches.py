"""Launches and traffic of a block and of an exit, from what the launchers would launch."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from bench.block_launches import block_launches, bytes_of, probe_launches, products_of
from bench.gpu_account import FLOAT, SEVEN, block_costs
from bench.gpu_parts import GPUS
from bench.launches import launches_of, meta, meta_linear
from bench.shapes import B16, B32, L14, Tower
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.ops import registry

LINEAR = "int8_linear"
both_inputs = pytest.mark.parametrize("has_class_token", [False, True])


def test_a_block_takes_seven_launches() -> None:
    for arch, batch in itertools.product(ARCHS.values(), (1, 32)):
        names = [launch.name for launch in block_launches(B32, batch, arch)]
        assert names == [
            "layer_norm_quantize", LINEAR, "int8_attention", LINEAR,
            "layer_norm_quantize", LINEAR, LINEAR,
        ]  # fmt: skip


towers = pytest.mark.parametrize("tower", [B32, B16, L14], ids=lambda tower: tower.name)


@towers
def test_a_block_moves_and_multiplies_what_the_account_says(tower: Tower) -> None:
    """Launch by launch; and in all the FLOPs that the operator is registered with."""
    assert "int8_block" in registry.OPERATORS
    formula = flop_registry[torch.ops.lraee.int8_block]
    for gpu, batch in itertools.product(GPUS, (1, 8, 32)):
        launches = block_launches(tower, batch, gpu.arch)
        form = {7: SEVEN, 9: FLOAT}[len(launches)]
        costs = block_costs(gpu, tower, batch, form)
        assert [bytes_of(one) for one in launches] == [cost.size_bytes for cost in costs]
        assert [products_of(one) for one in launches] == [cost.ops for cost in costs]
        D = tower.D
        norm, shapes = [(D,), (D,)], [(linear.N, linear.K) for linear in tower.linears]
        linears = [[shape, shape[:1], shape[:1], shape[:1]] for shape in shapes]
        flops = formula(
            (batch, tower.L, D), norm, *linears[:2], norm, *linears[2:], [1e-5, 1e-5],
            [False] * 4, tower.num_heads, False, "gelu", out_val=None,
        )  # fmt: skip
        assert sum(map(products_of, launches)) == flops


@both_inputs
def test_an_exit_takes_one_launch(has_class_token: bool) -> None:
    launches = probe_launches(B32, 32, has_class_token=has_class_token)
    assert [launch.name for launch in launches] == ["exit_probe"]


@towers
def test_bytes_of_a_block(tower: Tower) -> None:
    """float16 activations, int8 rows with 8 bytes of scale and zero point, weights with 12 each."""
    batch = 8
    M, D = batch * tower.L, tower.D
    norm = 2 * M * D + 8 * D + M * (D + 8)

    def linear(N: int, K: int, has_residual: bool) -> int:
        return M * (K + 8) + N * (K + 12) + 2 * M * N * (2 if has_residual else 1)

    def quantized(width: int) -> int:
        return M * (width + 8)

    attention = 2 * M * 3 * D + 2 * M * D
    expected = [
        norm, linear(3 * D, D, False), attention + quantized(D), linear(D, D, True),
        norm, linear(4 * D, D, False) + quantized(4 * D), linear(D, 4 * D, True),
    ]  # fmt: skip
    launches = block_launches(tower, batch, ARCHS[80])
    assert [bytes_of(one) for one in launches] == expected


@both_inputs
def test_bytes_of_an_exit(has_class_token: bool) -> None:
    """Tokens in float16, int8 weights, float16 classes; all else is of the size of the images."""
    batch, D, E, classes = 4, B32.D, B32.E, 1000
    P, H = (2 * D, 512) if has_class_token else (D, D)
    (launch,) = probe_launches(B32, batch, has_class_token=has_class_token)
    read = 2 * batch * B32.L * D + 8 * P + H * (P + 12) + E * (H + 12) + 2 * classes * E + 16
    between = 4 * batch * (P + D + H) + batch * (P + 8 + H + 8) + 16 * 16 * 16
    assert bytes_of(launch) == read + between + batch * (4 * E + 8 + 4 * 4)


def test_no_logits_in_memory() -> None:
    """Nothing the probe touches has B x K values, but the classes themselves."""
    for launch in probe_launches(B32, 512):
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor) and name not in ("classes_ptr", "partial_ptr"):
                assert value.shape != (512, 1000) and value.numel() != 512 * 1000, name
    parts = probe_launches(B32, 512)[0].arguments["part_ptr"]
    assert isinstance(parts, torch.Tensor) and parts.numel() == 512 * 16 * 4


def test_a_product_alone_is_not_compiled_anew_for_another_width() -> None:
    """Nor for more rows: how rows would be quantized is no part of it."""
    config = Config(64, 64, 128, num_warps=4, num_stages=4)
    constants = []
    for M, N in ((50, 768), (600, 768), (600, 3072)):
        x = (meta(M, 768, dtype=torch.int8), meta(M), meta(M, dtype=torch.int32))
        w = meta_linear(N, 768)
        (launch,) = launches_of(lambda x=x, w=w: int8_linear(*x, w, config=config))  # type: ignore[misc]
        constants.append(launch.constants)
    assert constants[0] == constants[1] == constants[2]


def test_specialisation_of_what_triton_compiles() -> None:
    x, gamma = meta(50, 768, dtype=torch.float16), meta(768)
    source = launches_of(lambda: layer_norm_quantize(x, gamma, gamma, 1e-5, True))[0]
    assert source.arguments["D"] == 768 and source.grid == (50,)
    assert source.constants["CHUNKS"] == 12 and source.constants["SYMMETRIC"] is True
