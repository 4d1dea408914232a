"""Memory of a process that serves a ViT-B/32: less in INT8 than in float32."""

from bench.footprint import in_its_own_process

TOWER, BATCH = "ViT-B-32", 32


def test_int8_takes_less_than_float32() -> None:
    floats, fast = (in_its_own_process(form, TOWER, BATCH) for form in ("float32", "int8"))
    freed = floats["weights_mb"] - fast["weights_mb"]
    # A quarter of the blocks' 97 %, and in float what stays: 92 of 335 MB
    assert freed > 0.7 * floats["weights_mb"]
    assert fast["after_mb"] < floats["after_mb"], (fast, floats)
    assert fast["peak_mb"] < 1.02 * floats["peak_mb"], "opening is the peak of both"
