"""What the compiler made of the kernels, where their speed hangs on it."""

import re
import shutil
import subprocess

import pytest

from lraee import _C

OBJDUMP = shutil.which("objdump")


@pytest.mark.skipif(OBJDUMP is None, reason="needs objdump (binutils)")
@pytest.mark.parametrize("level", ["avx512_vnni", "amx"])
def test_int8_linear_asks_for_its_weights_ahead(level: str) -> None:
    """GCC drops calls of a function that only prefetches: a tenth of ViT-B/32 at batch 1, once."""
    assert OBJDUMP is not None
    code = subprocess.run(
        [OBJDUMP, "-d", "-C", "--no-show-raw-insn", _C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    functions = re.split(r"\n\n[0-9a-f]+ ", code)
    product = {"avx512_vnni": "vpdpbusd", "amx": "tdpbssd"}[level]
    asking = [f for f in functions if product in f and "prefetcht1" in f]
    assert asking, f"no function with {product} prefetches weights"
