"""Launches and traffic of a block and of an exit, from what the launchers would launch."""

import pytest
import torch

from bench.gpu_model import (
    PARTS,
    block_launches,
    bytes_of,
    int8_us,
    probe_launches,
    rows,
    together_us,
)
from bench.launches import launches_of, meta
from bench.shapes import B32, L14, Tower
from lraee.kernels import configs
from lraee.kernels.archs import ARCHS
from lraee.kernels.layer_norm_quantize import layer_norm_quantize

LINEAR = "int8_linear"
both_inputs = pytest.mark.parametrize("has_class_token", [False, True])


def test_a_block_takes_nine_launches_or_seven() -> None:
    for batch in (1, 32):
        nine = block_launches(B32, batch, ARCHS[80], quantizes_together=False)
        names = [launch.name for launch in nine]
        assert names == [
            "layer_norm_quantize", LINEAR, "int8_attention", "quantize_rows", LINEAR,
            "layer_norm_quantize", LINEAR, "quantize_rows", LINEAR,
        ]  # fmt: skip
        fused = block_launches(B32, batch, ARCHS[80], quantizes_together=True)
        assert [launch.name for launch in fused] == [n for n in names if n != "quantize_rows"]
    as_towers_do = [(80, 1, 7), (80, 32, 9), (90, 1, 9)]
    for arch, batch, count in as_towers_do:
        assert len(block_launches(B32, batch, ARCHS[arch])) == count


def test_quantizing_together_is_not_free_in_the_model() -> None:
    """Programs that meet take longer than the same product with rows quantized before."""
    for part in PARTS:
        for launch in block_launches(B32, 1, part.arch, quantizes_together=True):
            is_from_float = launch.constants.get("FROM_FLOAT") is True
            assert (together_us(launch, part) >= 2 * configs.LOAD_LATENCY_US) == is_from_float
    h100 = next(part for part in PARTS if part.name == "H100")
    nine, seven = (
        int8_us(block_launches(B32, 1, h100.arch, quantizes_together=fused), h100, B32, "graph")
        for fused in (False, True)
    )
    assert seven > nine


@both_inputs
def test_an_exit_takes_three_launches(has_class_token: bool) -> None:
    launches = probe_launches(B32, 32, has_class_token=has_class_token)
    assert [launch.name for launch in launches] == ["pool", LINEAR, "score"]


@pytest.mark.parametrize("tower", [B32, L14], ids=lambda tower: tower.name)
def test_bytes_of_a_block(tower: Tower) -> None:
    """float16 activations, int8 rows with 8 bytes of scale and zero point, weights with 12 each."""
    batch = 8
    M, D = batch * tower.L, tower.D
    norm = 2 * M * D + 8 * D + M * (D + 8)

    def linear(N: int, K: int, has_residual: bool) -> int:
        return M * (K + 8) + N * (K + 12) + 2 * M * N * (2 if has_residual else 1)

    attention = 2 * M * 3 * D + 2 * M * D
    expected = [
        norm, linear(3 * D, D, False), attention, 2 * M * D + linear(D, D, True),
        norm, linear(4 * D, D, False), 2 * M * 4 * D + linear(D, 4 * D, True),
    ]  # fmt: skip
    launches = block_launches(tower, batch, ARCHS[80], quantizes_together=True)
    assert [bytes_of(one) for one in launches] == expected
    # A quantizer of its own writes the rows once more than they are read
    nine = block_launches(tower, batch, ARCHS[80], quantizes_together=False)
    assert sum(map(bytes_of, nine)) == sum(expected) + M * (D + 8) + M * (4 * D + 8)


@both_inputs
def test_tokens_are_read_once_by_an_exit(has_class_token: bool) -> None:
    """Of all launches of the probe only the first is given z."""
    batch, D = 4, B32.D
    P = 2 * D if has_class_token else D
    launches = probe_launches(B32, batch, has_class_token=has_class_token)
    assert [any(name == "z_ptr" for name in one.arguments) for one in launches] == [
        True, False, False,
    ]  # fmt: skip
    z, pooled = 2 * batch * B32.L * D, 4 * batch * (P + D)
    assert bytes_of(launches[0]) == z + pooled + 8 * P + batch * (P + 8) + 4 * batch


def test_no_logits_in_memory() -> None:
    """Nothing the probe touches has B x K values, but the classes themselves."""
    for launch in probe_launches(B32, 512):
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor) and name not in ("classes_ptr", "partial_ptr"):
                assert value.shape != (512, 1000) and value.numel() != 512 * 1000, name
    parts = probe_launches(B32, 512)[2].arguments["part_ptr"]
    assert isinstance(parts, torch.Tensor) and parts.numel() == 512 * 16 * 4


def test_specialisation_of_what_triton_compiles() -> None:
    x, gamma = meta(50, 768, dtype=torch.float16), meta(768)
    source = launches_of(lambda: layer_norm_quantize(x, gamma, gamma, 1e-5, True))[0]
    assert source.arguments["D"] == 768 and source.grid == (50,)
    assert source.constants["CHUNKS"] == 12 and source.constants["SYMMETRIC"] is True


def test_predictions_are_in_range() -> None:
    """The model cannot beat its own ceilings: 2x peak of INT8, and memory."""
    for row in rows(towers=(B32,)):
        assert 0 < float(str(row["int8_ms"])) < 1000
        assert 0.5 < float(str(row["ratio"])) < 4.5
        if row["batch"] == 32 and row["gpu"] == "A100":
            assert float(str(row["probe_share"])) <= 0.02
