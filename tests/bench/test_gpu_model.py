"""The account of GPU times: it reproduces what was measured, and never breaks a law."""

import itertools
import math
from pathlib import Path

import pytest

from bench import gpu_account as account
from bench import gpu_model, gpu_parts, gpu_products
from bench.gpu_account import FLOAT, FORMS, MEASURED, SEVEN, Form, block_costs, float16_costs
from bench.gpu_parts import GPUS, H200, Gpu
from bench.shapes import B16, B32, L14
from lraee.kernels.configs import Config, Shape

ROOT = Path(__file__).parents[2]
TOWERS = (B32, B16, L14)
each_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


def rms(ratios: list[float]) -> float:
    return math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios))


def test_towers_that_an_h200_measured_are_reproduced() -> None:
    by_kind: dict[str, list[float]] = {"int8": [], "float16": []}
    for row in gpu_model.fit_rows():
        by_kind[row.kind].append(row.ratio)
    assert all(len(ratios) == 12 for ratios in by_kind.values())
    assert max(abs(ratio - 1) for ratio in by_kind["int8"]) < 0.16 and rms(by_kind["int8"]) < 0.06
    assert max(abs(ratio - 1) for ratio in by_kind["float16"]) < 0.10
    assert rms(by_kind["float16"]) < 0.06


def test_products_that_an_h200_measured_are_reproduced() -> None:
    ratios = [
        account.product_us(H200, Shape(M, N, K), Config(*config), gpu_parts.LIGHT_EPILOGUE) / us
        for M, N, K, config, us in gpu_products.MEASURED
    ]
    assert len(ratios) == 32
    assert max(abs(ratio - 1) for ratio in ratios) < 0.25 and rms(ratios) < 0.13


@each_gpu
def test_more_images_never_take_less(gpu: Gpu) -> None:
    for tower, form in itertools.product(TOWERS, (*FORMS, SEVEN)):
        times = [account.int8_us(gpu, tower, batch, form) for batch in gpu_model.BATCHES]
        assert times == sorted(times), (tower.name, form.name)
    for tower in TOWERS:
        times = [account.float16_us(gpu, tower, batch) for batch in gpu_model.BATCHES]
        assert times == sorted(times)


@each_gpu
def test_no_launch_beats_its_ceilings(gpu: Gpu) -> None:
    for tower, batch, form in itertools.product(TOWERS, gpu_model.BATCHES, FORMS):
        for cost in block_costs(gpu, tower, batch, form):
            assert cost.us > cost.ops / (gpu.int8_tops * 1e6), cost
            assert cost.us > cost.size_bytes / (gpu.bandwidth_gb_s * 1e3), cost
        for cost in float16_costs(gpu, tower, batch):
            assert cost.us > cost.ops / (gpu.fp16_tflops * 1e6), cost


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_differ_in_time_alone(form: Form) -> None:
    """The same products and bytes; the seven-launch form reads float rows once less."""
    for tower, batch in itertools.product(TOWERS, (1, 32)):
        costs = block_costs(H200, tower, batch, form)
        first = block_costs(H200, tower, batch, MEASURED)
        assert [(c.size_bytes, c.ops) for c in costs] == [(c.size_bytes, c.ops) for c in first]
        seven = block_costs(H200, tower, batch, SEVEN)
        M, D = batch * tower.L, tower.D
        less = sum(c.size_bytes for c in costs) - sum(c.size_bytes for c in seven)
        assert len(costs) == 9 and len(seven) == 7 and less == 2 * M * 5 * D
        assert sum(c.ops for c in seven) == sum(c.ops for c in costs)


def test_operations_are_those_of_the_float_tower() -> None:
    for tower in TOWERS:
        ours = sum(cost.ops for cost in block_costs(H200, tower, 1, FLOAT))
        theirs = sum(cost.ops for cost in float16_costs(H200, tower, 1))
        outside = 2 * (tower.L - 1) * 3 * tower.patch_px**2 * tower.D + 2 * tower.D * tower.E
        assert ours == theirs and tower.layers * ours + outside == tower.flops


@each_gpu
def test_nine_launches_are_for_many_rows(gpu: Gpu) -> None:
    for tower, batch in itertools.product(TOWERS, (32, 128)):
        nine, seven = (account.int8_us(gpu, tower, batch, form) for form in (FLOAT, SEVEN))
        assert nine < seven, (tower.name, batch)


def test_the_page_shows_the_table_of_the_account() -> None:
    """docs/gpu.md: what is predicted is what the command prints."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    for line in gpu_model.markdown():
        assert line in page, f"python -m bench.gpu_model --markdown gives {line}"


def test_every_prediction_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_model.print_towers()
    gpu_model.print_rules()
    titles = [line for line in capsys.readouterr().out.splitlines() if line[:1].isupper()]
    assert sum(line.startswith("PREDICTION") for line in titles) == 2
