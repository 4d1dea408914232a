"""What this machine can do at most, and how much of it int8_linear reaches.

  python bench/ceilings.py                  # ceilings per thread and on all threads
  python bench/ceilings.py --int8-linear    # with the layers of ViT-B/32, interleaved

Ceilings come from register-only loops (bench/ceilings.cpp, AVX-512 machines). Times of one thread
are its CPU time, so that other processes on the machine do not count; times of all threads are
wall time, the best of the repetitions.
"""

import argparse
import ctypes
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lraee import _C, ops

SOURCE = Path(__file__).with_suffix(".cpp")
LOOPS = {
    "vnni512": "vpdpbusd zmm",
    "vnni256": "vpdpbusd ymm",
    "bf16_512": "vdpbf16ps zmm",
    "fp32_512": "vfmadd231ps zmm",
    "amx_int8": "tdpbssd",
    "amx_bf16": "tdpbf16ps",
}
CPU_FLAG = {"bf16_512": "avx512_bf16", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16"}
LAYERS = [
    (1600, 3072, 768, "gelu", "b32 mlp.c_fc"),
    (1600, 3072, 768, "quick_gelu", "b32 mlp.c_fc"),
    (1600, 768, 3072, "residual", "b32 mlp.c_proj"),
    (1600, 2304, 768, "none", "b32 attn qkv"),
    (1600, 768, 768, "residual", "b32 attn.out_proj"),
    (50, 3072, 768, "gelu", "b1 mlp.c_fc"),
    (50, 768, 3072, "residual", "b1 mlp.c_proj"),
    (50, 2304, 768, "none", "b1 attn qkv"),
    (50, 768, 768, "residual", "b1 attn.out_proj"),
]


def load_loops() -> ctypes.CDLL:
    """Compile ceilings.cpp and load it."""
    folder = tempfile.mkdtemp(prefix="lraee-ceilings-")
    library = f"{folder}/ceilings.so"
    subprocess.run(
        ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", library], check=True
    )
    loops = ctypes.CDLL(library)
    for name in LOOPS:
        getattr(loops, name).restype = ctypes.c_double
        getattr(loops, name).argtypes = [ctypes.c_int64]
    loops.read_bandwidth.restype = loops.thread_seconds.restype = ctypes.c_double
    loops.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return loops


def has_flag(flag: str) -> bool:
    """Whether the CPU reports a feature."""
    return flag in Path("/proc/cpuinfo").read_text().split()


def report_ceilings(loops: ctypes.CDLL, num_threads: int) -> None:
    """One line for each unit: one thread, and all threads at once."""
    with ThreadPoolExecutor(num_threads) as pool:
        for name, instruction in LOOPS.items():
            if not has_flag(CPU_FLAG.get(name, "avx512_vnni")):
                continue
            loop = getattr(loops, name)
            single = max(loop(2_000_000) for _ in range(5))
            every = sum(pool.map(loop, [20_000_000] * num_threads))
            print(
                f"{instruction:18s} {single:8.0f} GOP/s per thread, {every:8.0f} on {num_threads}"
            )
        buffers = [torch.ones(256 << 20, dtype=torch.int8) for _ in range(num_threads)]

        def read(buffer: Tensor) -> float:
            return float(loops.read_bandwidth(buffer.data_ptr(), buffer.numel(), 2))

        single = max(read(buffers[0]) for _ in range(3))
        every = max(sum(pool.map(read, buffers)) for _ in range(3))
        print(f"{'memory read':18s} {single:8.1f} GB/s per thread, {every:8.1f} on {num_threads}")


class Layer:
    """One call of int8_linear, with enough copies of the weight that each call finds a cold one."""

    def __init__(self, M: int, N: int, K: int, activation: str) -> None:
        """Random operands. `residual` stands for no activation and a residual."""
        copies = 1 if M > 200 else max(1, (64 << 20) // (N * K))
        int8 = [torch.randint(-127, 128, size, dtype=torch.int8) for size in ((M, K), (N, K))]
        self.x_q, w_q = int8
        self.packed = [ops.pack_weight(w_q) for _ in range(copies)]
        self.x_scale, self.x_zero = torch.rand(M) * 0.01, torch.zeros(M, dtype=torch.int32)
        self.w_scale, self.bias = torch.rand(N) * 0.001, torch.randn(N)
        self.residual = torch.randn(M, N) if activation == "residual" else None
        self.activation = "none" if activation == "residual" else activation
        self.giga_operations, self.turn = 2e-9 * M * N * K, 0

    def __call__(self) -> Tensor:
        """One call."""
        self.turn += 1
        w, w_sum = self.packed[self.turn % len(self.packed)]
        return torch.ops.lraee.int8_linear(  # type: ignore[no-any-return]
            self.x_q, self.x_scale, self.x_zero, w, self.w_scale, w_sum, self.bias,
            residual=self.residual, activation=self.activation,
        )  # fmt: skip


def measure(layer: Layer, loops: ctypes.CDLL, num_threads: int) -> tuple[float, float]:
    """Median share of the VNNI ceiling over interleaved rounds, and the best time in us."""
    torch.set_num_threads(num_threads)
    calls = max(1, round(0.02 / (layer.giga_operations / 800)))
    layer()
    shares, best_us = [], float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(9):
            ceiling = sum(pool.map(loops.vnni512, [1_000_000] * num_threads))
            clock = loops.thread_seconds if num_threads == 1 else time.perf_counter
            start = clock()
            for _ in range(calls):
                layer()
            elapsed = (clock() - start) / calls
            shares.append(layer.giga_operations / elapsed / ceiling)
            best_us = min(best_us, elapsed * 1e6)
    return statistics.median(shares), best_us


def main() -> None:
    """Print the header, the ceilings and, where asked, the layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--int8-linear", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    model = next(s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s)
    print(
        f"# {model.split(':')[1].strip()}, torch {torch.__version__}, {platform.python_version()}"
    )
    print(f"# level {_C.isa()}, command: python {' '.join(sys.argv)}")
    loops = load_loops()
    report_ceilings(loops, options.threads)
    if not options.int8_linear:
        return
    for M, N, K, activation, name in LAYERS:
        layer = Layer(M, N, K, activation)
        parts = []
        for num_threads in sorted({1, options.threads}):
            share, best_us = measure(layer, loops, num_threads)
            rate = layer.giga_operations / best_us * 1e6
            parts.append(f"{num_threads}T {best_us:8.0f} us {rate:6.0f} GOP/s {share:5.1%}")
        print(f"{name:18s} M={M:<5d}N={N:<5d}K={K:<5d}{activation:11s}| {' | '.join(parts)}")


if __name__ == "__main__":
    main()
