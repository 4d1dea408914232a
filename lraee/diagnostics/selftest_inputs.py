"""Arguments of every operator that put its kernels to the test; from a seed, on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.kernels.operands import BlockOperands, Norm, PackedLinear, ProbeHead

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int) -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(seed)


def rows_with_extremes(M: int, K: int, seed: int) -> Tensor:
    """Rows of every kind: spread, one outlier, constant, zero, tiny, huge, not finite."""
    source = generator(seed)
    x = torch.randn(M, K, generator=source) * torch.rand(M, 1, generator=source) * 4
    x += torch.randn(M, 1, generator=source)
    for m in range(M):
        kind = (m + seed) % 11
        if kind == 3:
            x[m, K // 2] = 1000.0
        elif kind == 4:
            x[m] = 0.0
        elif kind == 5:
            x[m] = -x[m].abs()
        elif kind == 6:
            x[m] *= 1e-41
        elif kind == 7:
            x[m] *= 1e37
        elif kind == 8:
            x[m, -1] = float("nan")
        elif kind == 9:
            x[m, 0] = float("-inf")
        elif kind == 10:
            x[m, :2] = torch.tensor([-3.3e38, 3.3e38])[: min(K, 2)]
    return x


def quantized_linear(
    M: int, N: int, K: int, *, seed: int = 0, extremes: bool = False
) -> dict[str, Tensor]:
    """Random arguments of int8_linear with w_q unpacked, so that each implementation packs it."""
    source = generator(seed)

    def int8(rows: int) -> Tensor:
        if extremes:
            picks = torch.randint(0, 2, (rows, K), generator=source)
            return torch.where(picks == 0, -128, 127).to(torch.int8)
        return torch.randint(-128, 128, (rows, K), generator=source, dtype=torch.int8)

    return {
        "x_q": int8(M),
        "x_scale": torch.rand(M, generator=source) * 0.02 + 1e-4,
        "x_zero": torch.randint(-128, 128, (M,), generator=source, dtype=torch.int32),
        "w_q": int8(N),
        "w_scale": torch.rand(N, generator=source) * 0.01 + 1e-5,
        "bias": torch.randn(N, generator=source),
        "layer_scale": torch.randn(N, generator=source),
        "residual": torch.randn(M, N, generator=source),
    }


def linear(M: int, N: int, K: int, seed: int) -> dict[str, Any]:
    """Arguments of int8_linear in which each optional one is there in half of the seeds."""
    given: dict[str, Any] = quantized_linear(M, N, K, seed=seed, extremes=seed % 5 == 0)
    given["out_dtype"] = TYPES[seed % 3]
    given["residual"] = given["residual"].to(given["out_dtype"])
    for bit, name in enumerate(("x_zero", "bias", "layer_scale", "residual")):
        if not (seed >> bit) & 1:
            given[name] = None
    w = given.pop("w_q")
    operands = [given.pop(name) for name in ("w_scale", "bias", "layer_scale")]
    w_sum = w.sum(1, dtype=torch.int32)
    given["linear"] = PackedLinear(w, operands[0], w_sum, *operands[1:])
    return given


def attention(B: int, L: int, H: int, d: int, seed: int) -> Tensor:
    """qkv [B, L, 3 H d] in the type of the seed; keys have a mean of several times their spread."""
    source = generator(seed)
    qkv = torch.randn(B, L, 3 * H * d, generator=source)
    qkv[..., H * d : 2 * H * d] += 4 * torch.randn(H * d, generator=source)
    return qkv.to(TYPES[seed % 3])


def rope_and_mask(B: int, L: int, H: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Angles of all tokens but the first, cos and sin [2, L - 1, d], and a key mask [B, L]."""
    source = generator(seed)
    angles = torch.rand(L - 1, d // 2, generator=source) * 6.28
    rope = torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2)
    return rope, torch.rand(B, L, generator=source) < 0.7


def probe(
    B: int, L: int, D: int, H: int | None, E: int, K: int, seed: int, has_class_token: bool = False
) -> tuple[Tensor, ProbeHead]:
    """Arguments of exit_probe; H None: a head of one layer.

    Each bias in half of the seeds, and classes in float16 in half of them.
    """
    source = generator(seed)
    P = 2 * D if has_class_token else D

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    def layer(N: int, K: int, has_bias: bool) -> PackedLinear:
        w = torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8)
        scale = torch.rand(N, generator=source) * 0.01 + 1e-4
        bias = normal(N) if has_bias else None
        return PackedLinear(w, scale, w.sum(1, dtype=torch.int32), bias)

    z = normal(B, L, D) * 3 + 10 * normal(D)
    z = z.to((torch.float32, torch.float16, torch.bfloat16)[seed % 3])
    first = layer(E if H is None else H, P, seed % 2 == 0)
    second = None if H is None else layer(E, H, seed % 4 < 2)
    classes = F.normalize(normal(K, E), dim=1)
    classes = classes.half() if seed % 4 in (1, 2) else classes
    gate = torch.tensor([2.0, 1.5, 1e-3, -1.0])
    return z, ProbeHead(Norm(normal(P), normal(P)), first, second, classes, 20.0, gate)


def float_linear(M: int, N: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, w and, for every other seed, a bias; w lies by row or by step."""
    dtype, source = TYPES[seed % 3], generator(seed)
    x, w = (torch.randn(n, K, generator=source).to(dtype) for n in (M, N))
    w = w if seed % 4 < 2 else w.t().contiguous().t()
    return x, w, torch.randn(N, generator=source).to(dtype) if seed % 2 else None


def block(
    B: int, L: int, H: int, d: int, seed: int, device: torch.device
) -> tuple[Tensor, BlockOperands]:
    """Arguments of int8_block on the device; weights in the CUDA layout."""
    source, D = generator(seed), H * d

    def linear(N: int, K: int, scale: Tensor | None = None) -> PackedLinear:
        w = torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8)
        w_scale = torch.rand(N, generator=source) * 0.02 / K**0.5
        w_sum = w.sum(1, dtype=torch.int32)
        parts = (w, w_scale, w_sum, torch.randn(N, generator=source), scale)
        return PackedLinear(*(None if part is None else part.to(device) for part in parts))

    x = torch.randn(B, L, D, generator=source).to(TYPES[seed % 3]).to(device)
    norms = [
        Norm(*torch.randn(2, D, generator=source).to(device).unbind(), eps) for eps in (1e-5, 1e-6)
    ]
    drawn = torch.rand(2 * D, generator=source)
    scale, of_input = (drawn[:D], drawn + 0.5) if seed % 2 else (None, None)
    return x, BlockOperands(
        norms[0], linear(3 * D, D), linear(D, D, scale), norms[1], linear(2 * D, D, of_input),
        linear(D, 2 * D), (False, seed % 3 == 0, False, seed % 3 == 1), H,
        seed % 4 == 3, "gelu" if seed % 2 else "quick_gelu",
    )  # fmt: skip
