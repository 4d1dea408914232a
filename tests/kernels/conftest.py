"""Kernel tests run in Triton's interpreter, chosen in tests/conftest.py before triton is imported.

TRITON_INTERPRET=0 (make test-gpu) leaves it out, for the tests marked gpu.
"""

import os
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

from lraee.kernels import register


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_wanted = os.environ["TRITON_INTERPRET"] == "1"
    assert register.is_interpreted() == is_wanted, (
        "triton was imported before tests/conftest.py could choose the interpreter"
    )


@pytest.fixture
def fixed_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float products of the interpreter sum over k in order, whatever the shapes.

    It calls numpy's matmul, whose BLAS may choose another order for another shape (OpenBLAS with
    OPENBLAS_CORETYPE=Haswell does); a GPU's kernel has one order.
    """
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not np.issubdtype(a.data.dtype, np.floating) or a.data.ndim != 2:
            return original(self, a, b, d, *options)
        x, y = (each.data.astype(d.data.dtype) for each in (a, b))
        total = np.zeros_like(d.data)
        for k in range(x.shape[1]):
            total += x[:, k, None] * y[None, k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
