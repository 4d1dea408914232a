"""Row operators on one core: share of memory bandwidth, attention against torch, cost of a probe.

  python -m bench.row_operators

Times are CPU time of one thread, so that other processes on the machine do not count, medians of
interleaved rounds. Bandwidth is what torch's own copy of a float32 tensor moves, for tensors far
larger than the L2 cache.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

import lraee
from bench.shapes import tower_batches
from lraee import ops
from lraee.kernels.operands import Norm, PackedLinear, ProbeHead

ROUNDS = 11
MIN_ROUND_S = 0.03
IMAGES = {"ViT-B/32": 32, "ViT-B/16": 8, "ViT-L/14": 4}


def times_us(*calls: Callable[[], object]) -> list[float]:
    """Median CPU time of each call, rounds interleaved."""
    counts = []
    for call in calls:
        call()
        start = time.thread_time()
        call()
        counts.append(max(1, int(MIN_ROUND_S / max(1e-7, time.thread_time() - start))))
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, count, seconds in zip(calls, counts, rounds, strict=True):
            start = time.thread_time()
            for _ in range(count):
                call()
            seconds.append((time.thread_time() - start) / count)
    return [statistics.median(seconds) * 1e6 for seconds in rounds]


def rows() -> None:
    """quantize_rows and layer_norm_quantize: bytes in and out per second, against a copy."""
    for M, K in ((50, 768), (1600, 768), (6304, 3072)):
        x, target = torch.randn(M, K), torch.empty(M, K)
        gamma, beta = torch.randn(K), torch.randn(K)
        us = times_us(
            partial(target.copy_, x),
            partial(ops.quantize_rows, x, symmetric=True),
            partial(ops.quantize_rows, x, symmetric=False),
            partial(ops.layer_norm_quantize, x, gamma, beta, symmetric=False),
            partial(F.layer_norm, x, (K,), gamma, beta),
        )
        rates = [8e-3 * M * K / us[0], *(5e-3 * M * K / t for t in us[1:4]), 8e-3 * M * K / us[4]]
        names = ("copy", "symmetric", "asymmetric", "layer_norm_quantize", "torch layer_norm")
        cells = (f"{n} {t:.0f} us {r:.1f} GB/s" for n, t, r in zip(names, us, rates, strict=True))
        print(f"M={M} K={K} | " + " | ".join(cells))


def _float_attention(qkv: Tensor, num_heads: int) -> Tensor:
    B, L, D3 = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D3 // 3)


def attention() -> None:
    """int8_attention against scaled_dot_product_attention, in float32 and bfloat16."""
    for tower in {tower.name: tower for tower, _ in tower_batches()}.values():
        B, H = IMAGES.get(tower.name, 8), tower.num_heads
        x = torch.randn(B, tower.L, 3 * tower.D)
        half = x.bfloat16()
        us = times_us(
            partial(ops.int8_attention, x, num_heads=H),
            partial(_float_attention, x, H),
            partial(ops.int8_attention, half, num_heads=H),
            partial(_float_attention, half, H),
        )
        print(
            f"{tower.name} B={B} L={tower.L} | float32 {us[0] / 1e3:.2f} ms {us[1] / us[0]:.2f}x"
            f" | bfloat16 {us[2] / 1e3:.2f} ms {us[3] / us[2]:.2f}x torch"
        )


def probe() -> None:
    """exit_probe with a head D -> D -> E and 1,000 classes, as a share of ViT-B/32 in INT8."""
    visual = lraee.accelerate(open_clip.create_model("ViT-B-32").eval()).visual
    D, E = 768, 512
    layers = []
    for N, K in ((D, D), (E, D)):
        w_q, w_scale, _ = ops.quantize_rows(torch.randn(N, K) / math.sqrt(K), symmetric=True)
        w, w_sum = ops.pack_weight(w_q)
        layers.append(PackedLinear(w, w_scale, w_sum))
    classes = F.normalize(torch.randn(1000, E))
    norm = Norm(torch.ones(D), torch.zeros(D))
    head = ProbeHead(norm, layers[0], layers[1], classes, 100.0, torch.ones(4))
    for B in (1, 8, 32):
        images, z = torch.randn(B, 3, 224, 224), torch.randn(B, 50, D)
        us = times_us(
            partial(ops.exit_probe, z, head),
            partial(visual, images),
        )
        print(f"exit_probe B={B} {us[0]:.0f} us | tower {us[1]:.0f} us | {us[0] / us[1]:.2%}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows()
        attention()
        probe()
