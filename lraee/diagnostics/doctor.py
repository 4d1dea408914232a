"""Which implementation of each operator runs on each device, and why the others do not."""

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lraee.diagnostics import tables
from lraee.measurement import machine
from lraee.ops import registry
from lraee.towers import text
from lraee.towers.families import family_lines

SCHEMA = "lraee.doctor/1"
LEVELS = ("scalar", "avx2", "avx_vnni", "avx512_vnni", "amx")


@dataclass(frozen=True)
class Finding:
    """One operator on one device: what runs, and why each other implementation does not."""

    operator: str
    device: str
    runs: str
    others: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Operators of one device that share a finding."""

    device: str
    runs: str
    operators: tuple[str, ...]
    others: dict[str, str]


def grouped(findings: list[dict[str, Any]]) -> list[Group]:
    """Return the findings of `examine`, operators with the same answer together."""
    groups: dict[str, Group] = {}
    for row in findings:
        key = repr((row["device"], row["runs"], row["others"]))
        before = groups[key].operators if key in groups else ()
        operators = (*before, row["operator"])
        groups[key] = Group(row["device"], row["runs"], operators, row["others"])
    return list(groups.values())


def examine() -> dict[str, Any]:
    """Return findings for every operator on the CPU and on CUDA, with versions and threads."""
    findings = [f for device in ("cpu", "cuda") for f in _device_findings(device)]
    return {
        "schema": SCHEMA,
        **machine.describe(),
        "isa": _isa_rows(),
        "cuda": cuda_rows(),
        "tilings": tables.tiling_lines() + tables.family_lines(),
        "float16": tables.float_lines(),
        "towers": list(family_lines()),
        "text_towers": list(text.family_lines()),
        "operators_on_cpu": machine.cpu_operators(),
        "operators": [asdict(finding) for finding in findings],
    }


def _device_findings(device: str) -> list[Finding]:
    find = _on_cpu if device == "cpu" else _on_cuda
    return [find(operator) for operator in registry.OPERATORS]


def _on_cpu(operator: str) -> Finding:
    others = {"triton": "runs on CUDA tensors only"}
    if (error := registry.CPU_EXTENSION_ERROR) is not None:
        others["c++"] = f"extension not built or not loadable: {error}"
    elif not _has_kernel(operator, "CPU"):
        others["c++"] = "the extension does not hold this operator"
    else:
        others["reference"] = "slower; backend='reference' chooses it"
        return Finding(operator, "cpu", machine.cpu_operators(), others)
    return Finding(operator, "cpu", "reference", others)


def _on_cuda(operator: str) -> Finding:
    others = {"c++": "runs on CPU tensors only"}
    if not torch.cuda.is_available():
        others["triton"] = others["reference"] = _no_cuda()
        return Finding(operator, "cuda", "nothing", others)
    if (reason := _no_triton(operator)) is not None:
        others["triton"] = reason
        return Finding(operator, "cuda", "reference", others)
    others["reference"] = "slower; backend='reference' chooses it"
    return Finding(operator, "cuda", "Triton", others)


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "no CUDA device: this torch is built without CUDA"
    return "no CUDA device"


def _no_triton(operator: str) -> str | None:
    try:
        archs = importlib.import_module("lraee.kernels.archs")
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    major, minor = torch.cuda.get_device_capability()
    reason: str | None = archs.unsupported_reason(10 * major + minor)
    if reason is None and not _has_kernel(operator, "CUDA"):
        return registry.TRITON_ERROR or "no Triton kernel is registered for this operator"
    return reason


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lraee::{operator}", key)


def _isa_rows() -> dict[str, str]:
    """Level of the C++ operators -> "runs", "available", or why not."""
    if (error := registry.CPU_EXTENSION_ERROR) is not None:
        return dict.fromkeys(LEVELS, f"extension not built or not loadable: {error}")
    from lraee import _C

    available = _C.isa_levels()
    chosen = machine.cpu_operators().removeprefix("C++ ")
    rows = {}
    for level in LEVELS:
        if level == chosen:
            rows[level] = "runs"
        elif level in available:
            rows[level] = f"available; LRAEE_ISA={level} chooses it"
        else:
            rows[level] = "the CPU, or its operating system, lacks it"
    return rows


def cuda_rows() -> list[str]:
    """Return one line per CUDA device, or one that says why there is none."""
    if not torch.cuda.is_available():
        return [_no_cuda()]
    rows = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        rows.append(f"cuda:{i} {torch.cuda.get_device_name(i)} sm_{major}{minor}")
    return rows
