"""Same start for every test: seeds, thread count, and no GPU test without a GPU."""

import os

# Before torch or triton is imported: tl.sum and its like are bound to the interpreter, or not, when
# triton.language is imported, and torch's FLOP counter imports that.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU, torch sees none"
    elif os.environ["TRITON_INTERPRET"] == "1":
        reason = "needs compiled kernels: TRITON_INTERPRET=0, as make test-gpu has it"
    else:
        return
    no_gpu = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds before a test; the thread count of torch is put back after it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
