"""Launches and traffic of a block and of an exit, from what the launchers would launch."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from bench.block_launches import block_launches, bytes_of, probe_launches, products_of
from bench.gpu_account import FLOAT, SEVEN, block_costs
from bench.gpu_parts import GPUS, GRAPH_GAP_US, Gpu
from bench.launches import launches_of, meta, meta_linear
from bench.shapes import B16, B32, L14, Tower
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.row_configs import FEW_ROWS, quantizes_its_rows
from lraee.ops import registry

LINEAR = "int8_linear"
both_inputs = pytest.mark.parametrize("has_class_token", [False, True])


def test_a_block_takes_seven_launches_of_few_rows_and_nine_of_many() -> None:
    for arch, batch in itertools.product(ARCHS.values(), (1, 32)):
        names = [launch.name for launch in block_launches(B32, batch, arch)]
        is_slow = arch.bandwidth_gb_s < 500  # an L4 reads 50 rows of fc1 in 2 us
        assert len(names) == (9 if batch == 32 else 8 if is_slow else 7)
        assert [name for name in names if name != "quantize_rows"] == [
            "layer_norm_quantize", LINEAR, "float_attention", LINEAR,
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
        seven, nine = (block_costs(gpu, tower, batch, form) for form in (SEVEN, FLOAT))
        costs = {7: seven, 8: [*seven[:5], *nine[6:]], 9: nine}[len(launches)]
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
    seven = [
        norm, linear(3 * D, D, False), attention + quantized(D), linear(D, D, True),
        norm, linear(4 * D, D, False) + quantized(4 * D), linear(D, 4 * D, True),
    ]  # fmt: skip
    launches = block_launches(tower, batch, ARCHS[80])
    moved = sum(bytes_of(one) for one in launches)
    apart = [K for K in (D, 4 * D) if not quantizes_its_rows(M, K, ARCHS[80])]
    assert moved == sum(seven) + sum(2 * M * K for K in apart)  # float rows are read once more
    if not apart:
        assert [bytes_of(one) for one in launches] == seven


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@towers
def test_rows_are_quantized_where_the_account_finds_it_faster(tower: Tower, gpu: Gpu) -> None:
    """Or where the account finds less than 1 us of a block between them."""
    for batch in range(1, 33):
        M, D = batch * tower.L, tower.D
        seven, nine = (
            {cost.name: cost.us + GRAPH_GAP_US for cost in block_costs(gpu, tower, batch, form)}
            for form in (SEVEN, FLOAT)
        )
        for maker, K, quantize in (("attention", D, 0), ("fc1", 4 * D, 1)):
            costs = block_costs(gpu, tower, batch, FLOAT)
            own = [cost.us for cost in costs if cost.name == "quantize"][quantize] + GRAPH_GAP_US
            saved = nine[maker] + own - seven[f"{maker}, quantized"]
            if M <= FEW_ROWS and abs(saved) > 1:
                assert quantizes_its_rows(M, K, gpu.arch) == (saved > 0), (maker, M, saved)
            if M > 2 * FEW_ROWS and K > D:
                assert not quantizes_its_rows(M, K, gpu.arch) and saved < 1, (maker, M, saved)


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
    assert source.constants["D"] == 768 and source.grid == (50,)
    assert source.constants["SYMMETRIC"] is True
