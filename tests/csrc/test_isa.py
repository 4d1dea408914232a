"""The choice of the instruction-set level."""

import os
import subprocess
import sys

import pytest

from lraee import _C

LEVELS = ["scalar", "avx2", "avx_vnni", "avx512_vnni", "amx"]


def test_levels_are_ordered_and_the_highest_is_chosen() -> None:
    levels = _C.isa_levels()
    assert levels == [level for level in LEVELS if level in levels]
    assert levels[0] == "scalar"
    if "LRAEE_ISA" not in os.environ:
        assert _C.isa() == levels[-1]


def test_each_level_can_be_forced_by_name() -> None:
    at_start = _C.isa()
    try:
        for level in _C.isa_levels():
            _C.set_isa(level)
            assert _C.isa() == level
    finally:
        _C.set_isa("")
    assert _C.isa() == at_start


def test_unknown_level_is_refused_by_name() -> None:
    at_start = _C.isa()
    with pytest.raises(ValueError, match=r"set_isa: name must name a level .*scalar.*, got 'sse2'"):
        _C.set_isa("sse2")
    assert _C.isa() == at_start


def _run(level: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch, lraee.ops; from lraee import _C;"
        " x = torch.ones(2, 4, dtype=torch.int8); w, w_sum = lraee.ops.pack_weight(x);"
        " linear = lraee.ops.PackedLinear(w, torch.ones(2), w_sum);"
        " y = lraee.ops.int8_linear(x, torch.ones(2), None, linear);"
        " print(_C.isa(), y.sum().item())"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LRAEE_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_forces_a_lower_level() -> None:
    assert _run("scalar").stdout.split() == ["scalar", "16.0"]


# A level that is known and that this CPU lacks, if there is one
ABSENT = [level for level in LEVELS if level not in _C.isa_levels()][:1]


@pytest.mark.parametrize("level", ["avx1024", *ABSENT])
def test_environment_with_a_level_that_is_not_there_fails_loudly(level: str) -> None:
    result = _run(level)
    assert result.returncode != 0
    assert "LRAEE_ISA must name a level that this machine has (scalar" in result.stderr
    assert f"got '{level}'" in result.stderr
