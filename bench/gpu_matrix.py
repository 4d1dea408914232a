"""Compiles every Triton kernel and config for every GPU family, without a GPU, and checks SASS.

    python -m bench.gpu_matrix                 every cell; fails on a gate or on a change
    python -m bench.gpu_matrix --subset        the cells that the tests compile
    python -m bench.gpu_matrix --update        writes bench/golden/gpu_matrix_triton-<version>.json

Gates of a cell: it compiles; int8 products are the tensor-core instruction of the architecture; no
load or store of spilled registers; shared memory within the part's limit; products are fed by
asynchronous copies; no byte-wide load from shared memory. Registers, instructions and occupancy are
recorded, and a record that differs from the golden one of the same Triton version fails too.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.launches import Launch, launches_of, meta, meta_linear
from bench.machine_code import Record, compile_cell
from lraee.kernels import configs, live_rows
from lraee.kernels.archs import ARCHS, Arch
from lraee.kernels.configs import Config, Shape
from lraee.kernels.exit_decide import agreement_score, exit_decide, exit_merge, exit_move
from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.exit_state import ExitState
from lraee.kernels.families import persistent_config
from lraee.kernels.float_attention import float_attention, float_attention_quantized
from lraee.kernels.float_linear import float_linear
from lraee.kernels.gated_quantize import gated_quantize
from lraee.kernels.int8_attention import int8_attention
from lraee.kernels.int8_linear import int8_linear, int8_linear_quantized
from lraee.kernels.int8_linear_persistent import int8_linear_persistent
from lraee.kernels.layer_norm_quantize import layer_norm_quantize
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.measured import MEASURED
from lraee.kernels.operands import AttentionOperands, Norm, PackedLinear, ProbeHead
from lraee.kernels.quantize_rows import quantize_rows

GOLDEN = Path(__file__).parent / "golden" / f"gpu_matrix_triton-{triton.__version__}.json"
ROWS_OF_BUCKET = (1, 50, 197, 1600)
"""A number of rows in each bucket of the config table."""
CALL_FRAME = 8
"""Bytes of stack that ptxas gives to a caller of its division routine and never touches."""
HAS_PRODUCT = ("int8_linear", "int8_linear_persistent", "int8_attention", "exit_probe")
HAS_FLOAT_PRODUCT = ("float_linear", "float_attention", "int8_attention")
HAS_PIPELINE = ("int8_linear", "int8_linear_persistent", "float_linear", "exit_probe")
"""int8 attention reads each tile once and centres it in registers: nothing to copy ahead. Rows of
floats that do not start at 16 bytes (K = 588, the patches of ViT-L/14) cannot be copied so.
"""


def linear_cells(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Each config with everything fused that can be, and as fc1 of a block uses it: with gelu, and
    its rows quantized after its tiles; scaled, as fc1 of a calibrated block.
    """
    for M, rows in zip(ROWS_OF_BUCKET, configs.TABLE[arch.capability], strict=True):
        for row in rows:
            if configs.legal(row, Shape(M, 768, 3072), arch):
                yield from _cells_of_config(f"M={M} {_label(row)}", M, row)
    for rows_of_layer in MEASURED.get(arch.capability, {}).values():
        for _, numbers in rows_of_layer:
            row = Config(*numbers)
            yield from _cells_of_config(f"measured {_label(row)}", 1600, row)


def _cells_of_config(label: str, M: int, config: Config) -> Iterator[tuple[str, Launch]]:
    half = torch.float16

    def quantized(K: int) -> tuple[Tensor, ...]:
        return meta(M, K, dtype=torch.int8), meta(M), meta(M, dtype=torch.int32)

    def options(N: int) -> dict[str, Any]:
        residual = meta(M, N, dtype=half)
        return {"residual": residual, "config": config, "activation": "gelu", "out_dtype": half}

    fc2 = meta_linear(768, 3072, has_layer_scale=True)
    yield label, launches_of(lambda: int8_linear(*quantized(3072), fc2, **options(768)))[0]
    only: dict[str, Any] = {"activation": "gelu", "out_dtype": half, "config": config}
    for title, is_scaled in (("quantized", False), ("quantized scaled", True)):
        fc1 = meta_linear(3072, 768, has_layer_scale=is_scaled)
        call = partial(int8_linear_quantized, *quantized(768), fc1, symmetric=False, **only)
        yield f"{title} {label}", launches_of(call)[0]


def persistent_cells(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """The config of a persistent launch for fc1, whose gelu it computes, plain and as calibrated,
    and for fc2.
    """
    half = torch.float16
    layers = (
        ("gelu", 3072, 768, False, False), ("gelu scaled", 3072, 768, True, False),
        ("residual", 768, 3072, True, True),
    )  # fmt: skip
    for name, N, K, is_scaled, has_residual in layers:
        config = persistent_config(arch, has_residual=has_residual)
        assert configs.legal(config, Shape(1600, N, K), arch), config
        x = meta(1600, K, dtype=torch.int8), meta(1600), meta(1600, dtype=torch.int32)
        call = partial(
            int8_linear_persistent, *x, meta_linear(N, K, has_layer_scale=is_scaled),
            activation="none" if has_residual else "gelu", config=config, arch=arch,
            out_dtype=half, residual=meta(1600, N, dtype=half) if has_residual else None,
        )  # fmt: skip
        yield f"{name} {_label(config)}", launches_of(call)[0]


def _label(config: Config) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} w{config.num_warps} s{config.num_stages} k{config.split_k}"


def float_linear_cells() -> Iterator[tuple[str, Launch]]:
    """The patch embedding and projection of real towers, few rows and many, both layouts of w."""
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        for M, N, K in ((49, 768, 3072), (1568, 768, 3072), (256, 1024, 588), (32, 512, 768)):
            w = meta(K, N, dtype=dtype).t() if N == 512 else meta(N, K, dtype=dtype)
            x = meta(M, K, dtype=dtype)
            call = lambda x=x, w=w: float_linear(x, w, meta(w.shape[0]))  # noqa: E731
            yield f"{name} M={M} N={N} K={K}", launches_of(call)[0]  # type: ignore[arg-type]


def row_cells() -> Iterator[tuple[str, Launch]]:
    """The row-wise kernels at the widths of real towers."""
    for M, K in ((50, 768), (1600, 768), (1600, 3072), (257, 4096), (1600, 4304), (50, 6656)):
        yield (
            f"{M}x{K}",
            launches_of(lambda M=M, K=K: quantize_rows(meta(M, K, dtype=torch.float16), False))[0],  # type: ignore[misc]
        )
    for M, D in ((50, 768), (1600, 768), (8224, 1024), (257, 1280), (8224, 1280), (8224, 1664)):
        x, gamma = meta(M, D, dtype=torch.float16), meta(D)
        call = lambda x=x, gamma=gamma: layer_norm_quantize(x, gamma, gamma, 1e-5, False)  # noqa: E731
        yield f"{M}x{D}", launches_of(call)[0]  # type: ignore[arg-type]
    for M, H, norm in ((197, 2048, (meta(2048), meta(2048), 1e-6)), (257, 2730, ())):
        x, name = meta(M, 2 * H, dtype=torch.float16), f"{M}x{H}{' norm' if norm else ''}"
        yield name, launches_of(partial(gated_quantize, x, "silu", *norm))[0]


def attention_cells() -> Iterator[tuple[str, Launch]]:
    """Attention at the token counts of real towers, resident and streamed, and causal text."""
    for B, L, H, d in ((1, 50, 12, 64), (32, 50, 12, 64), (32, 77, 8, 64), (32, 197, 12, 64),
                       (32, 257, 16, 64), (8, 257, 16, 80), (8, 577, 16, 64)):  # fmt: skip
        qkv = meta(B, L, 3 * H * d, dtype=torch.float16)
        config = configs.attention_config(L, d, L == 77)
        plain = partial(int8_attention, qkv, H, L == 77, config=config)
        yield f"B={B} L={L} d={d}", launches_of(plain)[0]
        if (L, d) not in ((257, 64), (257, 80)):
            continue
        masked = partial(int8_attention, qkv, H, key_mask=meta(B, L, dtype=torch.bool))
        yield f"mask B={B} L={L} d={d}", launches_of(masked)[0]


def float_attention_cells() -> Iterator[tuple[str, Launch]]:
    """Every width of head at the token counts of real towers, and what may be masked or rotated."""
    half, single = torch.float16, torch.float32
    for L, d, dtype, kind in (
        (50, 64, half, ""), (197, 64, half, ""), (77, 64, half, "causal"), (257, 64, half, "mask"),
        (729, 72, half, ""), (257, 80, half, ""), (257, 88, half, ""), (257, 96, half, ""),
        (257, 104, half, ""), (257, 112, half, ""), (1370, 128, half, ""), (257, 64, half, "rope"),
        (257, 128, half, "rope"), (257, 64, single, ""), (257, 64, single, "rope"),
        (257, 80, single, ""), (257, 128, single, "rope"),
    ):  # fmt: skip
        qkv, H = meta(32, L, 3 * 12 * d, dtype=dtype), 12
        rope = meta(2, L - 1, d) if kind == "rope" else None
        mask = meta(32, L, dtype=torch.bool) if kind == "mask" else None
        call = partial(float_attention, qkv, H, kind == "causal", rope, mask)
        name = f"L={L} d={d} {'fp16' if dtype is half else 'fp32'} {kind}".rstrip()
        yield name, launches_of(call)[0]
        if L > 257 or kind == "rope":
            continue
        operands = AttentionOperands(H, kind == "causal", rope, mask)
        quantized = partial(float_attention_quantized, qkv[:1], operands, symmetric=False)
        yield f"quantized {name}", launches_of(quantized)[0]


def probe_cells(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """The probe of one image and of many, with heads of two layers and of one, on the mean alone
    and with the class token beside it; the widest row is that of ViT-H/14 and its class token.
    """

    def probe(
        B: int, L: int, D: int, P: int, first: PackedLinear, second: PackedLinear | None = None
    ) -> Launch:
        E = (second or first).N
        z, classes = meta(B, L, D, dtype=torch.float16), meta(1000, E, dtype=torch.float16)
        head = ProbeHead(Norm(meta(P), meta(P)), first, second, classes, 100.0, meta(4))
        config = configs.probe_config(B, arch)
        return launches_of(lambda: exit_probe(z, head, config=config))[0]

    for B, L, D, E in ((1, 50, 768, 512), (32, 257, 1280, 1024)):
        affine = probe(B, L, D, 2 * D, meta_linear(E, 2 * D))
        yield f"B={B} L={L} D={D} E={E} affine", affine
    for B, L, D, E in ((1, 50, 768, 512), (32, 257, 1024, 768)):
        two_layers = probe(B, L, D, 2 * D, meta_linear(512, 2 * D), meta_linear(E, 512))
        yield f"B={B} L={L} D={D} E={E} class token", two_layers
    B, L, D, E = 32, 50, 768, 512
    yield f"B={B} L={L} D={D} E={E}", probe(B, L, D, D, meta_linear(D, D), meta_linear(E, D))
    for B, L, D, E in ((1, 50, 768, 512), (32, 257, 1024, 768)):
        with live_rows.using(LiveRows(meta(1, dtype=torch.int32), B)):
            live = probe(B, L, D, 2 * D, meta_linear(512, 2 * D), meta_linear(E, 512))
        yield f"B={B} L={L} D={D} E={E} live rows", live


def exit_cells() -> Iterator[tuple[str, Launch]]:
    """Decisions on the device: of one image, which moves nothing, and of many; every gate."""

    def call(B: int, gate: str, e: int) -> tuple[ExitState, Any, Tensor]:
        result, part = meta(B, 768, dtype=torch.float16), meta(B)
        images = meta(1, dtype=torch.int32)
        state = ExitState.allocate(images, meta(2, 4), result, compares=gate == "agreement")
        probe = (meta(B, 768), meta(B, dtype=torch.int64), part, part, part, part)
        return state, probe, meta(B, 257, 1024, dtype=torch.float16)

    gates = (
        (1, "given", 0), (1, "given", 1), (128, "given", 1), (128, "patience", 1),
        (128, "static", 0),
    )  # fmt: skip
    for B, gate, e in gates:
        state, probe, z = call(B, gate, e)
        decide = partial(exit_decide, state, e, probe, gate, 6)
        yield f"B={B} {gate}, exit {e}", launches_of(decide)[0]
    yield "B=128 L=257 D=1024", launches_of(partial(exit_move, state, 0, probe[0], z))[0]
    yield "E=768", launches_of(partial(exit_merge, state, state.result, 12))[0]
    state, probe, _ = call(128, "agreement", 1)
    score = partial(agreement_score, state, 1, probe[0], probe[2])
    yield "E=768, exit 1", launches_of(score)[0]


def cells(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Every (name, launch) of an architecture, each name once."""
    recorded = set()
    for sub in (
        linear_cells(arch), persistent_cells(arch), float_linear_cells(), row_cells(),
        attention_cells(), float_attention_cells(), probe_cells(arch), exit_cells(),
    ):  # fmt: skip
        for label, launch in sub:
            name = f"sm_{arch.capability} {launch.name} {label}"
            if name not in recorded:
                recorded.add(name)
                yield name, launch


def subset(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """One cell of each kernel and the largest tile of each table, for the tests."""
    wanted = ("M=1600 128x128", "persistent", "50x768", "L=257 d=64", "E=768 class token")
    for name, launch in cells(arch):
        if any(part in name for part in wanted):
            yield name, launch


def failures(record: Record, launch: Launch, arch: Arch) -> list[str]:
    """The gates that a cell does not pass."""
    result = []
    if record.spills or record.local or record.stack > CALL_FRAME:
        result.append(f"{record.spills} spill instructions, {record.stack} bytes of stack")
    if record.shared > arch.shared_per_block:
        result.append(f"{record.shared} bytes of shared memory, limit {arch.shared_per_block}")
    if launch.name in HAS_PRODUCT and not record.int8_products:
        result.append("no int8 tensor-core instruction")
    if launch.name in HAS_FLOAT_PRODUCT and not record.float_products:
        result.append("no float tensor-core instruction")
    is_aligned = launch.name != "float_linear" or launch.arguments["K"] % 16 == 0  # type: ignore[operator]
    if launch.name in HAS_PIPELINE and is_aligned and not record.async_copies:
        result.append("no asynchronous copy")
    if record.byte_loads:
        result.append(f"{record.byte_loads} byte-wide loads from shared memory")
    if record.saturating:
        result.append(f"{record.saturating} floats made bytes by saturation (see quantize_tile)")
    if not record.warps_per_sm:
        result.append("does not fit on an SM")
    return result


def run(
    archs: list[Arch], only_subset: bool, golden: dict[str, dict[str, int]]
) -> dict[str, Record]:
    """Compiles, prints a line per cell, and exits with 1 if a gate fails or a record changed."""
    records, wrong = {}, 0
    for arch in archs:
        for name, launch in (subset if only_subset else cells)(arch):
            try:
                record = compile_cell(launch, arch)
            except (triton.TritonError, subprocess.CalledProcessError) as error:
                wrong += 1
                print(f"{name}: FAILS to compile: {error}", flush=True)
                continue
            records[name] = record
            problems = failures(record, launch, arch)
            if golden and golden.get(name) != asdict(record):
                problems.append(f"differs from the golden record {golden.get(name)}")
            wrong += bool(problems)
            facts = " ".join(f"{key}={value}" for key, value in asdict(record).items())
            print(
                f"{name}: {facts} {'FAILS: ' + '; '.join(problems) if problems else 'ok'}",
                flush=True,
            )
    print(f"{len(records)} cells compiled, {wrong} failing (Triton {triton.__version__})")
    if wrong:
        sys.exit(1)
    return records


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--subset", action="store_true", help="the cells that the tests compile")
    parser.add_argument("--update", action="store_true", help="write the golden records")
    options = parser.parse_args()
    golden = {}
    if GOLDEN.exists():
        golden = json.loads(GOLDEN.read_text())
    archs = [ARCHS[capability] for capability in options.arch]
    records = run(archs, options.subset, {} if options.update else golden)
    if options.update:
        merged = golden | {name: asdict(record) for name, record in records.items()}
        GOLDEN.parent.mkdir(exist_ok=True)
        lines = (f"  {json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged))
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
