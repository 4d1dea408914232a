"""Registration: each operator reaches its launcher, or keeps its definition with a reason."""

from typing import Any

import pytest
import torch

from lraee.kernels import archs, register
from lraee.ops import reference, registry
from tests.support import assert_same


def test_launchers_take_the_arguments_of_the_definition() -> None:
    x = torch.randn(3, 40)
    for name, arguments in (
        ("quantize_rows", (x, False)),
        ("layer_norm_quantize", (x, torch.ones(40), torch.zeros(40), 1e-5, True)),
    ):
        definition = getattr(reference, name)
        actual = register.implementation(name, definition)(*arguments)
        for value, expected in zip(actual, definition(*arguments), strict=True):
            assert_same(value, expected, name=name)


def test_every_launcher_is_registered_for_cuda() -> None:
    registered: dict[str, str] = {}

    class Recorder:
        def impl(self, name: str, function: Any, key: str) -> None:
            registered[name] = key

    assert register.register(Recorder(), registry.DEFINITIONS) is None  # type: ignore[arg-type]
    assert registered == dict.fromkeys(register.LAUNCHERS, "CUDA")


def test_an_old_triton_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.2.0")
    assert register.register(None, registry.DEFINITIONS) == "triton must be 3.4 or newer, got 3.2.0"  # type: ignore[arg-type]


def test_gpus_without_an_int8_path_have_a_reason() -> None:
    assert all(archs.unsupported_reason(capability) is None for capability in archs.ARCHS)
    for capability, part in (
        (75, "Turing"),
        (70, "no int8 tensor cores"),
        (103, "B300"),
        (130, "not in"),
    ):
        assert part in (archs.unsupported_reason(capability) or "")


def test_an_unsupported_gpu_runs_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnTuring:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(register, "reason_of", lambda device: "sm_75: too old")
    call = register.implementation("quantize_rows", lambda x, symmetric: ("definition", symmetric))
    assert call(OnTuring(), True) == ("definition", True)  # type: ignore[arg-type]
