"""Build lraee._C, the C++ implementation of the operators for CPU.

LRAEE_BUILD_EXT=0 leaves it out: the package then runs on its plain-torch reference. Any other
failure to build is an error, because a missing extension would only show as a slow model.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

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
# One build runs on every Python from PYTHON_TAG on and on every torch from 2.10 on: the sources
# keep to Python's limited API (torch defines Py_LIMITED_API) and to torch's stable ABI. No OpenMP
# here: torch_parallel_for runs on the threads of libtorch, which torch.set_num_threads reaches.
PYTHON_TAG = "cp311"
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# libtorch_cpu alone is needed, and lraee imports torch first.
LINK_FLAGS = ["-Wl,--as-needed"] if sys.platform == "linux" else []


def extension() -> dict[str, object]:
    """Arguments of setup() that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    def below(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))

    module = CppExtension(
        "lraee._C",
        below("*.cpp"),
        depends=below("*.h"),
        include_dirs=[str((ROOT / "csrc").resolve())],
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )

    class Build(BuildExtension):
        """Without what an older version of this file left: Python would prefer it."""

        def run(self) -> None:
            if self.inplace:
                for stale in (ROOT / "lraee").glob("_C.cpython-*.so"):
                    stale.unlink()
            super().run()

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**({} if os.environ.get("LRAEE_BUILD_EXT") == "0" else extension()))
