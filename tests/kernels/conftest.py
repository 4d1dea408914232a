"""Kernel tests run in Triton's interpreter, chosen in tests/conftest.py before triton is imported.

TRITON_INTERPRET=0 (make test-gpu) leaves it out, for the tests marked gpu.
"""

import os

import pytest

from lraee.kernels import register


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_wanted = os.environ["TRITON_INTERPRET"] == "1"
    assert register.is_interpreted() == is_wanted, (
        "triton was imported before tests/conftest.py could choose the interpreter"
    )
