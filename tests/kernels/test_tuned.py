"""The user's table of tilings: rows of lraee tune are picked, anything else is left out."""

import math
from typing import Any

import pytest
import triton

from lraee.kernels import configs, tuned, user_cache
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, epilogue_name, measured, pick

GPU = "NVIDIA H200"
ARCH = ARCHS[90]
SHAPE = Shape(6304, 2304, 768)
GOOD = {
    "N": 2304, "K": 768, "most_m": 8192, "epilogue": "none", "family": "simple",
    "config": [64, 64, 128, 4, 3, 1], "us": 41.5,
}  # fmt: skip


def content(*rows: Any, **changes: Any) -> dict[str, Any]:
    return {"gpu": GPU, "triton": triton.__version__, "rows": list(rows)} | changes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    for function in (tuned.table, configs.pick):
        function.cache_clear()
    yield
    for function in (tuned.table, configs.pick):
        function.cache_clear()


def test_a_row_is_picked_up_to_its_rows_and_for_its_epilogue():
    wide = GOOD | {"most_m": 1 << 31, "config": [128, 64, 128, 4, 3, 1]}
    user_cache.write("tilings", content(wide, GOOD))
    assert pick(SHAPE, ARCH, "none", GPU) == Config(64, 64, 128, 4, 3)
    assert pick(Shape(8193, 2304, 768), ARCH, "none", GPU) == Config(128, 64, 128, 4, 3)
    assert pick(SHAPE, ARCH, "gelu", GPU) == measured(SHAPE, ARCH) != GOOD["config"]
    assert pick(SHAPE, ARCH, "none", None) == measured(SHAPE, ARCH)
    assert tuned.reason(GPU) is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "lraee tune writes one"),
        (content(GOOD, gpu="NVIDIA A10"), "for gpu 'NVIDIA A10'"),
        (content(GOOD, gpu=["x"] * 1000), "for gpu"),
        (content(GOOD, triton="3.0.0"), "for triton '3.0.0'"),
        (content(rows={"N": 1}), "no list of rows"),
        (content(*[GOOD] * 5000), "no list of rows"),
    ],
)
def test_tables_that_do_not_hold_here(given, reason):
    if given is not None:
        user_cache.write("tilings", given)
    assert tuned.table(GPU).rows == {} and reason in str(tuned.reason(GPU))
    assert pick(SHAPE, ARCH, "none", GPU) == measured(SHAPE, ARCH)


@pytest.mark.parametrize(
    "change",
    [
        {"N": "2304"}, {"N": True}, {"K": -1}, {"K": 1 << 40}, {"most_m": 1.5}, {"most_m": None},
        {"epilogue": 3}, {"family": "other"}, {"family": ["simple"]}, {"config": [64] * 5},
        {"config": "111111"}, {"config": [64, 64, 128, 4, 3, -1]}, {"us": math.inf}, {"us": "1"},
    ],
)  # fmt: skip
def test_rows_that_are_none(change):
    user_cache.write("tilings", content(GOOD | change, 7, [GOOD], GOOD | {"N": 9}))
    assert tuned.table(GPU).rows.keys() == {(9, 768, "none")}
    assert "left out" in str(tuned.reason(GPU))


@pytest.mark.parametrize("numbers", [[64, 64, 128, 3, 3, 1], [63, 64, 128, 4, 3, 1], [256, 256, 256, 4, 9, 1]])  # fmt: skip  # noqa: E501
def test_a_config_that_is_not_legal_is_not_picked(numbers):
    user_cache.write("tilings", content(GOOD | {"config": numbers}))
    assert pick(SHAPE, ARCH, "none", GPU) == measured(SHAPE, ARCH)


def test_a_layer_scale_takes_the_row_of_the_layer_without():
    own = GOOD | {"epilogue": "none+layer_scale", "config": [128, 64, 128, 4, 3, 1]}
    user_cache.write("tilings", content(GOOD | {"epilogue": "gelu"}, GOOD, own))
    for epilogue in ("gelu", "gelu+layer_scale"):
        assert pick(SHAPE, ARCH, epilogue, GPU) == Config(64, 64, 128, 4, 3)
    assert pick(SHAPE, ARCH, "none+layer_scale", GPU) == Config(128, 64, 128, 4, 3)
    assert pick(SHAPE, ARCH, "quick_gelu+layer_scale", GPU) == measured(SHAPE, ARCH)


def test_names_of_epilogues():
    assert epilogue_name("gelu", has_layer_scale=False, has_residual=False) == "gelu"
    name = epilogue_name("none", has_layer_scale=True, has_residual=True, quantizes=True)
    assert name == "none+layer_scale+residual+quantized"
