"""Memory of a process that serves a ViT-B/32: less in INT8 than in float32."""

import math

import pytest

from bench.footprint import in_its_own_process

TOWER, BATCH = "ViT-B-32", 32


@pytest.fixture(scope="module")
def forms() -> tuple[dict[str, float], dict[str, float]]:
    """What a float32 and an INT8 process take."""
    floats, fast = (in_its_own_process(form, TOWER, BATCH) for form in ("float32", "int8"))
    return floats, fast


def test_int8_takes_less_than_float32(forms: tuple[dict[str, float], dict[str, float]]) -> None:
    floats, fast = forms
    freed = floats["weights_mb"] - fast["weights_mb"]
    # A quarter of the blocks' 97 %, and in float what stays: 92 of 335 MB
    assert freed > 0.7 * floats["weights_mb"]
    assert fast["after_mb"] < floats["after_mb"], (fast, floats)
    assert fast["peak_mb"] < 1.02 * floats["peak_mb"], "opening is the peak of both"


def test_int8_serves_in_less_than_float32(forms: tuple[dict[str, float], dict[str, float]]) -> None:
    floats, fast = forms
    if math.isnan(fast["serving_mb"]) or math.isnan(floats["serving_mb"]):
        pytest.skip("this Linux does not let VmHWM start anew")
    assert fast["serving_mb"] < floats["serving_mb"], (fast, floats)
