"""Kernel tests run in Triton's interpreter, which must be chosen before a kernel is imported."""

import os
import sys

INTERPRETED = "lraee.kernels.common"

assert INTERPRETED not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
    "kernels were imported before tests/kernels/conftest.py could choose the interpreter"
)
os.environ["TRITON_INTERPRET"] = "1"
