"""Which implementation runs where."""

import pytest
import torch

from lraee.kernels import register
from lraee.layers import batch_invariant as rowwise
from lraee.ops import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_reference_is_plain_torch_everywhere() -> None:
    assert backend.implementation("reference", CPU) == "reference"
    assert backend.implementation("reference", CUDA) == "reference"
    assert rowwise.is_fixed(CPU, "reference") and not rowwise.is_fixed(CUDA, "reference")


@pytest.mark.skipif(register.unavailable_reason() is not None, reason="no Triton")
def test_a_gpu_without_int8_kernels_runs_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's own float layers: the definition's fixed order would take a step a column."""
    reasons = {0: None, 1: "sm_75 (Turing): no int8 products"}
    monkeypatch.setattr(register, "reason_of", lambda device: reasons[device.index])
    turing = torch.device("cuda", 1)
    assert backend.implementation("auto", CUDA) == "triton"
    assert backend.implementation("auto", turing) == "reference"
    assert rowwise.is_fixed(CUDA, "auto") and not rowwise.is_fixed(turing, "auto")
    assert rowwise.is_fixed(CPU, "auto")
