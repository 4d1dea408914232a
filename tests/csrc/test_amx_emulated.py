"""The AMX code of int8_linear without AMX: its tiles emulated, its bits the scalar's."""

from pathlib import Path

import pytest

from tests.csrc.compiled import CSRC, HERE, needs_compiler, run_compiled
from tests.csrc.levels import LEVELS


@needs_compiler
@pytest.mark.skipif("avx512_vnni" not in LEVELS, reason="its vectors need AVX512")
def test_amx_code_has_the_bits_of_the_scalar_code(tmp_path: Path) -> None:
    sources = (CSRC / "cpu" / name / "scalar.cpp" for name in ("int8_linear", "pack_weight"))
    result = run_compiled(tmp_path, HERE / "amx_emulated.cpp", *sources, optimise="-O1")
    assert result.returncode == 0 and result.stdout.startswith("0 of 11200"), result.stdout
