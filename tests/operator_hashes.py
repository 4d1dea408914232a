"""Prints a digest of what every CPU operator gives, per level, as JSON.

Needs torch and lraee alone. Its numbers come from integer arithmetic: any torch gives the same.
"""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor

import lraee.ops  # noqa: F401  (registers the operators)
from lraee import _C

OPS = torch.ops.lraee


def numbers(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    """Values in [-scale, scale), a multiple of scale / 2^15 each."""
    count = int(torch.tensor(shape).prod())
    index = torch.arange(count, dtype=torch.int64) + 7919 * seed
    bits = ((index * 2654435761) >> 7) % 65536
    return ((bits.float() - 32768) / 32768 * scale).reshape(shape)


def weight(N: int, K: int, seed: int) -> list[Tensor]:
    """[w, w_scale, w_sum, bias] of a linear."""
    w_q = (numbers(N, K, seed=seed) * 127).round().to(torch.int8)
    w, w_sum = OPS.pack_weight(w_q)
    return [w, numbers(N, seed=seed + 1).abs() / 99 + 1e-3, w_sum, numbers(N, seed=seed + 2)]


def digest(*tensors: Tensor) -> str:
    """First 16 digits of the sha256 of the bytes."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def cases() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Operator -> its results on fixed operands."""
    B, L, D, heads, K = 3, 17, 64, 2, 10
    x, tokens, norm = numbers(B * L, D), numbers(B, L, D), [numbers(D, seed=3), numbers(D, seed=4)]
    x_q = OPS.quantize_rows(x, False)
    linear = weight(48, D, 5)
    block = (
        norm, weight(3 * D, D, 6), weight(D, D, 7), norm, weight(4 * D, D, 8), weight(D, 4 * D, 9),
        [1e-5, 1e-5], [False] * 4, heads, False, "gelu",
    )  # fmt: skip
    first, classes = weight(D, D, 11), numbers(K, D, seed=12)
    image = ((numbers(40, 30, 3) + 1) * 127).to(torch.uint8)
    rope, mask = numbers(2, L, D // heads, seed=13), numbers(B, L, seed=14) < 0.9
    return {
        "quantize_rows": lambda: OPS.quantize_rows(x, False),
        "layer_norm_quantize": lambda: OPS.layer_norm_quantize(x, *norm, 1e-5, True),
        "gated_quantize": lambda: OPS.gated_quantize(x, "silu", numbers(D // 2), None, 1e-6),
        "pack_weight": lambda: tuple(linear),
        "int8_linear": lambda: (OPS.int8_linear(*x_q, *linear, activation="gelu"),),
        "int8_linear bfloat16": lambda: (
            OPS.int8_linear(*x_q, *linear, out_dtype=torch.bfloat16),
        ),
        "float_linear": lambda: (OPS.float_linear(x, numbers(40, D, seed=15), None),),
        "int8_attention": lambda: (
            OPS.int8_attention(numbers(B, L, 3 * D, seed=16), heads, False, rope, mask),
        ),
        "int8_block": lambda: (OPS.int8_block(tokens, *block),),
        "int8_block, one image": lambda: (OPS.int8_block(tokens[:1], *block),),
        "exit_probe": lambda: OPS.exit_probe(
            tokens, *norm, 1e-5, *first, None, None, None, None, classes, 20.0, numbers(4, seed=17)
        ),
        "resize_crop_normalize": lambda: (
            OPS.resize_crop_normalize(
                image, [0.0, 0.0, 30.0, 40.0], [20, 15], [2, 1, 14, 13], "bicubic", False, None,
                True,
            ),
        ),
    }  # fmt: skip


def main() -> None:
    """Print the digests of all levels, and what the operators run on."""
    digests = {}
    for level in _C.isa_levels():
        _C.set_isa(level)
        digests |= {f"{level}: {name}": digest(*call()) for name, call in cases().items()}
    _C.set_isa("")
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
