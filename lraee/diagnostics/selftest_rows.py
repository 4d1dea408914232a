"""The cases of `lraee selftest` that work row by row: quantizers, with norms and gates."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from lraee.diagnostics import selftest_inputs
from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned, poisoned_all
from lraee.diagnostics.selftest_results import QUANTIZED, ROW_PADS, exact, label, short
from lraee.diagnostics.selftest_sizes import Case, Difference, Sizes, Target
from lraee.kernels import gated_quantize, layer_norm_quantize, quantize_rows, row_configs
from lraee.ops import reference


def row_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """quantize_rows and layer_norm_quantize, rows of every kind, both symmetries."""
    shapes = itertools.product(sizes.rows, sizes.widths)
    for seed, ((M, K), symmetric) in enumerate(itertools.product(shapes, (False, True))):
        dtype = selftest_inputs.TYPES[seed % 3]
        shape = f"M={M} K={K} {short(dtype)} {'symmetric' if symmetric else 'asymmetric'}"
        for row in dict.fromkeys(row_configs.row_config(m, K) for m in (1, 513)):
            find = _rows_difference(target, M, K, seed, symmetric, dtype, row)
            yield Case("quantize_rows", label(row), shape, find)
        # Twice as wide compiles six times as long: a minute or two, for a width that no tower has
        rows = (row_configs.chunk_config(m, K) for m in (1, 513) if K <= 2048)
        for row in dict.fromkeys(rows):
            find = _norm_difference(target, M, K, seed, symmetric, dtype, row)
            yield Case("layer_norm_quantize", label(row), shape, find)
        for row in dict.fromkeys(row_configs.chunk_config(m, 2 * K) for m in (1, 513) if K <= 1024):
            find = _gated_difference(target, M, K, seed, dtype, row)
            yield Case("gated_quantize", label(row), f"M={M} H={K} {short(dtype)}", find)


def _rows_difference(
    target: Target, M: int, K: int, seed: int, symmetric: bool, dtype: torch.dtype, config: Any
) -> Difference:
    def find() -> str | None:
        x = selftest_inputs.rows_with_extremes(M, K, seed).to(dtype)
        with guarded_outputs():
            actual = quantize_rows.quantize_rows(
                poisoned(x, ROW_PADS[seed % 3], target.device), symmetric, config=config
            )
        return exact(QUANTIZED, actual, reference.quantize_rows(x, symmetric))

    return find


def _norm_difference(
    target: Target, M: int, D: int, seed: int, symmetric: bool, dtype: torch.dtype, config: Any
) -> Difference:
    def find() -> str | None:
        x = selftest_inputs.rows_with_extremes(M, D, seed).to(dtype)
        gamma, some = torch.randn(2, D, generator=selftest_inputs.generator(seed)).unbind()
        beta = None if seed % 4 == 3 else some  # RMSNorm
        eps = (1e-5, 1e-6, 0.1)[seed % 3]
        with guarded_outputs():
            actual = layer_norm_quantize.layer_norm_quantize(
                poisoned(x, ROW_PADS[seed % 3], target.device),
                *poisoned_all([gamma, beta], device=target.device), eps, symmetric, config=config,
            )  # fmt: skip
        expected = reference.layer_norm_quantize(x, gamma, beta, eps, symmetric)
        return exact(QUANTIZED, actual, expected)

    return find


GATED = ("x_q", "x_scale", "x_zero", "r_q", "r_scale")


def _gated_difference(
    target: Target, M: int, H: int, seed: int, dtype: torch.dtype, config: Any
) -> Difference:
    """Without an activation, so that all is the same bits; with a norm in every other case."""

    def find() -> str | None:
        x = selftest_inputs.rows_with_extremes(M, 2 * H, seed).to(dtype)
        vectors = torch.randn(2, H, generator=selftest_inputs.generator(seed)).unbind()
        norms: tuple[tuple[Any, ...], ...] = ((), (*vectors, 1e-5), (vectors[0], None, 1e-6))
        norm = norms[seed % 3]
        with guarded_outputs():
            actual = gated_quantize.gated_quantize(
                poisoned(x, ROW_PADS[seed % 3], target.device), "none",
                *poisoned_all(list(norm), device=target.device), config=config,
            )  # fmt: skip
        return exact(GATED, actual, reference.gated_quantize(x, "none", *norm))

    return find
