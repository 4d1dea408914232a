"""The exp of the row operators, compiled on its own: the bound that other tests build on."""

from pathlib import Path

import pytest

from tests.csrc.compiled import HERE, needs_compiler, run_compiled
from tests.csrc.levels import LEVELS


@needs_compiler
@pytest.mark.skipif("avx2" not in LEVELS, reason="needs AVX2")
def test_exp_is_within_two_roundings(tmp_path: Path) -> None:
    result = run_compiled(tmp_path, HERE / "exp_errors.cpp", optimise="-O2")
    assert result.returncode == 0, result
    lines = result.stdout.split("\n")
    of_exp_nonpositive, of_exp, of_sigmoid = map(float, lines[0].split())
    # Polynomial 2e-9, its coefficients 2^-26, r 2^-25, the last sum 2^-24.
    assert of_exp_nonpositive <= 2.0**-23
    assert of_exp <= 2.0**-23
    assert of_sigmoid <= 2.0**-23
    special = lines[1].split()
    # x = 0, -inf, NaN, NaN with a payload, 89, inf, -1e30, -86.5; only the second takes x > 0.
    assert [special[i] for i in (0, 1, 2, 3, 6, 7)] == ["1", "0", "nan", "nan", "0", "0"]
    assert special[8:] == ["1", "0", "nan", "nan", "inf", "inf", "0", "0"]
