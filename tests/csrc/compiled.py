"""C++ programs of the tests, compiled against csrc."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")


def run_compiled(folder: Path, *sources: Path, optimise: str) -> subprocess.CompletedProcess[str]:
    """What the program of these sources prints, and its exit status; compiled in `folder`.

    Raises: CalledProcessError where it does not compile.
    """
    program = folder / "program"
    flags = [optimise, "-std=c++20", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    return subprocess.run([program], check=False, capture_output=True, text=True)
