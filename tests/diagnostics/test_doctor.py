import os
import subprocess
import sys

import pytest
import torch

from lraee.diagnostics import doctor
from lraee.ops import registry


def by_key(found: dict) -> dict[tuple[str, str], dict]:
    return {(row["operator"], row["device"]): row for row in found["operators"]}


def test_every_operator_is_answered_once_for_each_device() -> None:
    rows = by_key(doctor.examine())
    assert rows.keys() == {(op, device) for op in registry.OPERATORS for device in ("cpu", "cuda")}
    for row in rows.values():
        named = {row["runs"].split()[0].lower(), *row["others"]}
        named.discard("nothing")
        assert named == {"reference", "c++", "triton"}
        assert all(row["others"].values())


def test_it_says_what_the_dispatcher_runs() -> None:
    for (operator, device), row in by_key(doctor.examine()).items():
        if device == "cpu":
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"lraee::{operator}", "CPU")
            assert row["runs"].startswith("C++") == has


def test_a_missing_extension_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CPU_EXTENSION_ERROR", "No module named 'lraee._C'")
    result = doctor.examine()
    row = by_key(result)["int8_linear", "cpu"]
    assert row["runs"] == "reference"
    assert row["others"]["c++"] == (
        "extension not built or not loadable: No module named 'lraee._C'"
    )
    assert set(result["isa"].values()) == {row["others"]["c++"]}
    assert "No module named" in result["operators_on_cpu"]


def test_levels_that_the_cpu_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _C = pytest.importorskip("lraee._C", reason="the C++ extension is not built here")
    monkeypatch.setattr(_C, "isa_levels", lambda: ["scalar", "avx2"])
    monkeypatch.setattr(_C, "isa", lambda: "avx2")
    assert doctor.examine()["isa"] == {
        "scalar": "available; LRAEE_ISA=scalar chooses it",
        "avx2": "runs",
        "avx_vnni": "the CPU, or its operating system, lacks it",
        "avx512_vnni": "the CPU, or its operating system, lacks it",
        "amx": "the CPU, or its operating system, lacks it",
    }


def test_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    result = doctor.examine()
    row = by_key(result)["int8_linear", "cuda"]
    assert row["runs"] == "nothing" and row["others"]["triton"] == "no CUDA device"
    assert result["cuda"] == ["no CUDA device"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.cuda_rows() == ["no CUDA device: this torch is built without CUDA"]


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "sm_75 (Turing): Triton cannot"), ((10, 3), "sm_103 (B300): almost no int8")],
)
def test_gpus_without_int8_kernels_say_why(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *i: capability)
    result = doctor.examine()
    row = by_key(result)["int8_linear", "cuda"]
    assert row["runs"] == "reference" and row["others"]["triton"].startswith(reason)
    assert result["cuda"] == [f"cuda:0 GPU sm_{capability[0]}{capability[1]}"]


def test_groups_hold_every_operator_once() -> None:
    findings = doctor.examine()["operators"]
    groups = doctor.grouped(findings)
    flat = [(op, group.device) for group in groups for op in group.operators]
    assert sorted(flat) == sorted((row["operator"], row["device"]) for row in findings)
    assert len({repr((g.device, g.runs, g.others)) for g in groups}) == len(groups)


def test_a_wrong_isa_is_said_not_raised() -> None:
    pytest.importorskip("lraee._C", reason="the C++ extension is not built here")
    code = "from lraee.diagnostics import doctor; print(doctor.examine()['operators'][0]['runs'])"
    environment = os.environ | {"LRAEE_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.startswith("nothing (LRAEE_ISA must name a level that this machine has")


def test_towers_are_named() -> None:
    result = doctor.examine()
    assert any("CLIPModel" in line for line in result["towers"])
    text = "; ".join(result["text_towers"])
    assert all(name in text for name in ("HFTextEncoder", "RoBERTa", "Siglip2", "TextTransformer"))
