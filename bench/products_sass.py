"""What the machine code of the products for sm_90 must show; needs no GPU.

    python -m bench.products_sass

A line of JSON a product, and exit code 1 where a gate fails:

persistent   Triton split the warps: the part that copies tiles multiplies nothing, and each of two
             parts that multiply copies no operand, so while one waits for its int8 wgmma (waits at
             0) tiles are loaded and the other multiplies or finishes.
gluon        in the loop over K one int8 wgmma is left running while the next is begun
             (WARPGROUP.DEPBAR at 1), in both groups.
Both         no spill, 168 registers a thread at most: 384 threads on an SM.
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.launches import meta, meta_linear, recorded
from bench.machine_code import TOOLS, tool
from lraee.kernels.archs import ARCHS
from lraee.kernels.families import gluon_config, gluon_unavailable_reason, persistent_config
from lraee.kernels.int8_linear_persistent import int8_linear_persistent
from lraee.kernels.tiling import Shape

ARCH = ARCHS[90]
MOST_REGISTERS = 168


@dataclass(frozen=True)
class Facts:
    """Of one product."""

    registers: int
    shared: int
    spills: int
    waits: list[int]
    parts: list[dict[str, int]]
    """Copies of operands and products of each part between which the warps are split."""


def _parts(ttgir: str) -> list[dict[str, int]]:
    start = ttgir.find("ttg.warp_specialize(")
    if start < 0:
        return []
    texts = re.split(r"\n\s+partition\d+\(", ttgir[start:])
    return [
        {
            "copies": len(re.findall(r"async_tma_copy_global_to_local", text)),
            "products": len(re.findall(r"warp_group_dot\b", text)),
        }
        for text in texts
    ]


def facts_of(compiled: Any) -> Facts:
    """What a compiled kernel shows."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, (TOOLS, usage)
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", sass)
    return Facts(
        int(registers[1]), compiled.metadata.shared, len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        [int(wait, 16) for wait in waits], _parts(compiled.asm["ttgir"]),
    )  # fmt: skip


def compile_(source: Any, num_warps: int, **options: int) -> Facts:
    """Compiles a source for sm_90."""
    target = GPUTarget("cuda", ARCH.capability, 32)
    options = {"num_warps": num_warps, **options}
    return facts_of(triton.compile(source, target=target, options={**options, "enable_fp_fusion": False}))  # fmt: skip  # noqa: E501


def persistent(has_residual: bool) -> Facts:
    """fc1 with gelu, or fc2 with layer scale and residual."""
    N, K = (768, 3072) if has_residual else (3072, 768)
    config = persistent_config(ARCH, has_residual=has_residual)
    x = meta(1600, K, dtype=torch.int8), meta(1600), meta(1600, dtype=torch.int32)
    call = partial(
        int8_linear_persistent, *x, meta_linear(N, K, has_layer_scale=has_residual), config=config,
        activation="none" if has_residual else "gelu", out_dtype=torch.float16, arch=ARCH,
        residual=meta(1600, N, dtype=torch.float16) if has_residual else None,
    )  # fmt: skip
    with recorded() as launches:
        call()
    (launch,) = launches
    return compile_(launch.source(), **launch.options)


def gluon(K: int, activation: str) -> Facts:
    """fc1 or in_proj of K inputs."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from lraee.kernels.int8_linear_gluon import int8_linear_gluon

    x = meta(1600, K, dtype=torch.int8), meta(1600), meta(1600, dtype=torch.int32)
    with recorded() as launches:
        int8_linear_gluon(
            *x, meta_linear(3072, K), config=gluon_config(Shape(1600, 3072, K)),
            activation=activation, arch=ARCH,
        )  # fmt: skip
    (launch,) = launches
    types = {torch.int8: "i8", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16"}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value: Any = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif hasattr(value, "block_shape"):
            element = types[value.base.dtype]
            signature[name] = f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*{types[value.dtype]}" if is_tensor else "i32"
            if is_tensor or name == "N":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(launch.kernel, signature, dict(launch.constants), attributes)
    return compile_(source, **{k: v for k, v in launch.options.items() if k == "num_warps"})


def failures(family: str, facts: Facts, has_residual: bool = False) -> list[str]:
    """The gates that a product does not pass."""
    result = []
    if facts.spills:
        result.append(f"{facts.spills} spill instructions")
    if facts.registers > MOST_REGISTERS:
        result.append(f"{facts.registers} registers")
    if facts.shared > ARCH.shared_per_block:
        result.append(f"{facts.shared} bytes of shared memory")
    if family == "persistent":
        copying = [part for part in facts.parts if part["copies"] and not part["products"]]
        multiplying = [part for part in facts.parts if part["products"]]
        # One copy of theirs is that of the residual
        are_split = all(part["copies"] <= has_residual for part in multiplying)
        if len(copying) != 1 or len(multiplying) != 2 or not are_split:
            result.append(f"warps are not split: {facts.parts}")
    elif facts.waits.count(1) < 2:
        result.append(f"every wgmma is waited for: {facts.waits}")
    return result


def main() -> None:
    """Command line."""
    products = {
        ("persistent", "gelu"): partial(persistent, False),
        ("persistent", "residual"): partial(persistent, True),
    }
    if gluon_unavailable_reason() is None:
        for K in (768, 1024):
            for activation in ("gelu", "none"):
                products["gluon", f"{activation} K={K}"] = partial(gluon, K, activation)
    is_wrong = False
    for (family, name), compiling in products.items():
        facts = compiling()
        wrong = failures(family, facts, name == "residual")
        is_wrong |= bool(wrong)
        print(json.dumps({"product": f"{family} {name}", **vars(facts), "fails": wrong}))
    print(f"Triton {triton.__version__}; gluon: {gluon_unavailable_reason() or 'available'}")
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
