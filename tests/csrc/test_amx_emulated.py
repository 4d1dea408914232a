"""The AMX code of int8_linear without AMX: its tiles emulated, its bits the scalar's."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lraee import _C

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")
@pytest.mark.skipif("avx512_vnni" not in _C.isa_levels(), reason="its vectors need AVX512")
def test_amx_code_has_the_bits_of_the_scalar_code(tmp_path: Path) -> None:
    program = tmp_path / "amx_emulated"
    sources = [
        Path(__file__).with_name("amx_emulated.cpp"),
        *(CSRC / "cpu" / f"{name}.cpp" for name in ("int8_linear_scalar", "pack_weight")),
    ]
    subprocess.run(
        [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", f"-I{CSRC}", *sources, "-o", program],
        check=True,
    )
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.startswith("0 of 11200"), found.stdout[-2000:]
