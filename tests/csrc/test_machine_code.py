"""The machine code of the kernels, where their speed depends on it."""

import platform
import re
import shutil
import subprocess

import pytest

from lraee import _C

OBJDUMP = shutil.which("objdump")
pytestmark = [
    pytest.mark.skipif(OBJDUMP is None, reason="needs objdump (binutils)"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 code"),
]


@pytest.fixture(scope="module")
def functions() -> list[str]:
    """The machine code of the extension, one text per function."""
    assert OBJDUMP is not None
    command = [OBJDUMP, "-d", "--no-show-raw-insn", _C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.split(r"\n\n[0-9a-f]+ ", code)


@pytest.mark.parametrize("product", [r"vpdpbusd .*%zmm", r"vpdpbusd .*%ymm", r"tdpbssd "])
def test_int8_linear_prefetches_its_weights(functions: list[str], product: str) -> None:
    """GCC drops calls of a function that only prefetches: a tenth of ViT-B/32 at batch 1, once."""
    products = [function for function in functions if re.search(product, function)]
    assert any("prefetcht1" in function for function in products), f"{len(products)} functions"
