"""Build lraee._C, the C++ implementation of the operators for CPU.

LRAEE_BUILD_EXT=0 leaves it out: the package then runs on its plain-torch reference. Any other
failure to build is an error, because a missing extension would only show as a slow model.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

# Every file is compiled for the baseline: code for a newer instruction set sits in a
# `#pragma GCC target` region and runs only after a probe. No contraction: a fused multiply-add
# that the source does not spell would change the last bit.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-maybe-uninitialized",  # GCC 12 warns about its own AVX-512 headers
]
# OpenMP is on for the compiler only, because at::parallel_for is a template in torch's header. The
# runtime must be the one libtorch brings: a second one would start its own pool of threads, which
# torch.set_num_threads does not reach.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []


def extension() -> dict[str, object]:
    """Arguments of setup() that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    root = Path(__file__).parent

    def below(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob(pattern))

    module = CppExtension(
        "lraee._C",
        below("*.cpp"),
        depends=below("*.h"),
        include_dirs=[str((root / "csrc").resolve())],
        extra_compile_args={"cxx": [*CXX_FLAGS, *OPENMP_FLAGS]},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**({} if os.environ.get("LRAEE_BUILD_EXT") == "0" else extension()))
