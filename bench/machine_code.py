"""What a launch of a Triton kernel compiles to: registers, spills, instructions; needs no GPU."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from bench.launches import Launch
from lraee.kernels.archs import Arch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {
    "int8_products": r"\b(?:IMMA|IGMMA|UTCIMMA|UTCOMMA)\b",
    "float_products": r"\b(?:HMMA|HGMMA|UTCHMMA)\b",
    "async_copies": r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b",
    "byte_loads": r"\bLDS\.[US]8\b",
    "saturating": r"\bF2IP?\.[US]8\b",
    "spills": r"\b(?:STL|LDL)\b",
}


@dataclass(frozen=True)
class Record:
    """What one cell compiled to."""

    registers: int
    stack: int
    local: int
    shared: int
    int8_products: int
    float_products: int
    async_copies: int
    byte_loads: int
    saturating: int
    spills: int
    warps_per_sm: int


@dataclass(frozen=True)
class MachineCode:
    """What one launch compiles to for one architecture: resources as cuobjdump prints them."""

    usage: str
    sass: str
    shared: int
    num_warps: int
    is_warp_specialized: bool


def machine_code(launch: Launch, arch: Arch) -> MachineCode:
    """Compiles one launch for one architecture."""
    options = {**launch.options, "enable_fp_fusion": False}
    target = GPUTarget("cuda", arch.capability, 32)
    compiled = triton.compile(launch.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    facts, is_split = compiled.metadata, "ttg.warp_specialize" in compiled.asm["ttgir"]
    return MachineCode(usage, sass, facts.shared, facts.num_warps, is_split)


def compile_cell(launch: Launch, arch: Arch) -> Record:
    """Compiles one launch for one architecture and reads its machine code."""
    code = machine_code(launch, arch)
    result = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code.usage)
    assert result, code.usage
    registers, stack, local = map(int, result.groups())
    counts = {name: len(re.findall(pattern, code.sass)) for name, pattern in INSTRUCTIONS.items()}
    if code.is_warp_specialized:
        counts["byte_loads"] -= 1  # of the number of the part that a group of warps is to run
    warps = _resident_warps(arch, registers, code.shared, code.num_warps)
    return Record(registers, stack, local, code.shared, **counts, warps_per_sm=warps)


def tool(name: str, *arguments: str) -> str:
    """What this tool of the CUDA toolkit, which Triton brings, prints."""
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _resident_warps(arch: Arch, registers: int, shared: int, num_warps: int) -> int:
    """Warps of this kernel that one SM holds: registers come in units of 8, 1 KiB is reserved."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = arch.shared_per_sm // (shared + 1024)
    return num_warps * min(by_registers, by_shared, arch.warps_per_sm // num_warps)
