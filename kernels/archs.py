"""What the kernels know of each GPU architecture, and which architectures they run on.

Limits are those of NVIDIA's CUDA programming guide ("technical specifications per compute
capability"); rates are dense datasheet peaks of the largest common part of each family.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One compute capability: limits that decide legality, rates that decide cost."""

    capability: int
    part: str
    sms: int
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    int8_tops: float
    fp16_tflops: float
    bandwidth_gb_s: float
    l2_gb_s: float
    int8_instruction: str
    """Mnemonic of the int8 tensor-core instruction in SASS."""


KIB = 1024

ARCHS: dict[int, Arch] = {
    arch.capability: arch
    for arch in (
        Arch(80, "A100", 108, 163 * KIB, 164 * KIB, 64, 624, 312, 1555, 4500, "IMMA"),
        Arch(86, "A10", 72, 99 * KIB, 100 * KIB, 48, 250, 125, 600, 2000, "IMMA"),
        Arch(89, "L4", 58, 99 * KIB, 100 * KIB, 48, 242, 121, 300, 1900, "IMMA"),
        Arch(90, "H100", 132, 227 * KIB, 228 * KIB, 64, 1979, 989, 3350, 5500, "IGMMA"),
        Arch(100, "B200", 148, 227 * KIB, 228 * KIB, 64, 4500, 2250, 8000, 10000, "UTCIMMA"),
        Arch(120, "RTX 5090", 170, 99 * KIB, 100 * KIB, 48, 838, 419, 1792, 6000, "IMMA"),
    )
}
"""Architectures that the config tables are written for; of them sm_90 was run (one H200)."""

DEFAULT_ARCH = ARCHS[80]
"""Stands in where there is no GPU: in Triton's interpreter."""


def unsupported_reason(capability: int) -> str | None:
    """Why the int8 kernels do not run on this compute capability, or None if they do.

    Args:
      capability: 10 * major + minor, e.g. 80 for an A100.
    """
    if capability in ARCHS:
        return None
    name = f"sm_{capability}"
    if capability == 75:
        return f"{name} (Turing): Triton cannot compile int8 products for it (triton issue 9349)"
    if capability < 75:
        return f"{name}: no int8 tensor cores"
    if capability == 103:
        return f"{name} (B300): almost no int8 throughput; fp16 is faster there"
    return f"{name}: not in the compile matrix (known: {', '.join(f'sm_{c}' for c in ARCHS)})"
