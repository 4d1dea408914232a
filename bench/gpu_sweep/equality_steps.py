"""Equality of every variant: with its definition, of an image in any batch, and beside a NaN."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from bench.gpu_sweep import variants
from bench.gpu_sweep.kernel_steps import EPILOGUES, TINY
from bench.gpu_sweep.run import Context, Item, Step, Values
from bench.shapes import B16, B32
from lraee.diagnostics import product_families as families
from lraee.diagnostics import tuning
from lraee.diagnostics.product_families import ProductFamily
from lraee.diagnostics.selftest_inputs import rows_with_extremes
from lraee.diagnostics.tuned_layers import Operands, TunedLayer
from lraee.kernels.configs import Config, Shape
from lraee.ops import error_bounds

IMAGES = (1, 32, 128)
"""Sizes of batch in which an image must have the same bits."""


def verdict(difference: str | None) -> Mapping[str, Values]:
    """A line."""
    return {"": {"equal": difference is None, "difference": difference}}


def families_alone(context: Context) -> Iterator[Item]:
    """The check of each family at first use, which is made in a process of its own: it may hang."""
    for family in families.FAMILIES:
        yield Item(family.name, partial(_family_alone, context, family))


def _family_alone(context: Context, family: ProductFamily) -> Mapping[str, Values]:
    return verdict(families.failure(family, context.target))


def products(context: Context) -> Iterator[Item]:
    """Each candidate of each family with the tower's epilogue: ragged rows, alone, beside a NaN.

    Shapes are those of towers, whose candidates are compiled by then.
    """
    towers, batches, most = ((TINY,), (1,), 1) if context.is_dry else ((B32, B16), (1, 8), 18)
    for tower, batch, family in itertools.product(towers, batches, families.FAMILIES):
        for linear in tower.linears:
            layer = TunedLayer(linear.N, linear.K, EPILOGUES[linear.name])
            M = batch * tower.L
            run = partial(_family_equality, context, family, layer, M, most)
            shape = f"M={M} N={layer.N} K={layer.K} {layer.epilogue.name}"
            yield Item(f"{family.name} {shape}", run)


def _family_equality(
    context: Context, family: ProductFamily, layer: TunedLayer, M: int, most: int
) -> Mapping[str, Values]:
    shape = Shape(M, layer.N, layer.K)
    given = Operands.of(layer, M, 1, context.dtype, context.target.device)
    pick = families.present_pick(shape, context.target, layer.epilogue.name)
    expected = tuning.product(given, pick)
    difference = tuning.definition_difference(given, expected)
    configs = family.candidates(shape, context.target.arch, most, adds=layer.epilogue.adds)
    for config in configs:
        difference = difference or _config_difference(given, config, expected)
    (line,) = verdict(difference).values()
    return {"": {**line, "checked": len(configs)}}


def _config_difference(given: Operands, config: Config, expected: Tensor) -> str | None:
    """Of the plain product, of its first row alone, and of all rows but one where one is NaN."""
    first = tuning.product(given, config)
    if not torch.equal(first, expected):
        return f"{families.numbers(config)} {config.family}: other bits"
    alone = tuning.product(given.one_row(), config)
    if not torch.equal(alone, expected[:1]):
        return f"{families.numbers(config)} {config.family}: other bits alone"
    x_q, scale, zero = given.x
    row = len(scale) // 2
    broken = scale.clone()
    broken[row] = float("nan")
    y = tuning.product(Operands((x_q, broken, zero), given.linears, given.options), config)
    others = torch.arange(len(scale), device=scale.device) != row
    if not y[row].isnan().all() or not torch.equal(y[others], expected[others]):
        return f"{families.numbers(config)} {config.family}: NaN in another row"
    return None


def attention(context: Context) -> Iterator[Item]:
    """Each kernel of attention: its definition, the batch, and an image that is NaN."""
    shapes = ((17, 2, 16),) if context.is_dry else ((50, 12, 64), (197, 12, 64), (257, 16, 64))
    for one in variants.ATTENTION:
        for L, H, d in shapes:
            run = partial(_attention_equality, context, one, L, H, d)
            yield Item(f"{one.name} L={L} H={H} d={d}", run)


def _attention_equality(
    context: Context, one: variants.Attention, L: int, H: int, d: int
) -> Mapping[str, Values]:
    largest = 3 if context.is_dry else IMAGES[-1]
    source = torch.Generator().manual_seed(L)
    qkv = torch.randn(largest, L, 3 * H * d, generator=source).to(context.dtype)
    there = qkv.to(context.target.device)
    y = one.run(there, H)
    expected = one.definition(qkv[:2], H)
    bound = one.bound(qkv[:2], expected, H)
    difference = error_bounds.first_difference(y[:2].cpu(), expected, bound)
    return verdict(difference or _batch_difference(lambda x: one.run(x, H), there, y))


def _batch_difference(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> str | None:
    """Of images alone and in smaller batches, and beside one that is NaN."""
    for images in (1, *(n for n in IMAGES if 1 < n < len(x))):
        if not torch.equal(run(x[-images:].contiguous()), y[-images:]):
            return f"other bits in a batch of {images}"
    broken = x.clone()
    broken[0] = float("nan")
    beside = run(broken)
    if not torch.equal(beside[1:], y[1:]):
        return "NaN in another image"
    return None if beside[0].isnan().any() else "NaN was lost"


def rows(context: Context) -> Iterator[Item]:
    """Each row-wise kernel against its definition, rows of every kind and ragged widths."""
    shapes = ((17, 33),) if context.is_dry else ((50, 768), (777, 3072), (513, 1024), (257, 4096))
    for one in variants.ROWS:
        for M, K in shapes:
            yield Item(f"{one.name} {M}x{K}", partial(_rows_equality, context, one, M, K))


def _rows_equality(context: Context, one: variants.Rows, M: int, K: int) -> Mapping[str, Values]:
    x = rows_with_extremes(M, K, 0).to(context.dtype)
    actual, expected = one.run(x.to(context.target.device)), one.definition(x)
    named = zip(("x_q", "x_scale", "x_zero"), actual, expected, strict=True)
    differences = (
        (name, error_bounds.first_difference(a.cpu(), b)) for name, a, b in named
    )  # fmt: skip
    return verdict(
        next((f"{name}: {text}" for name, text in differences if text is not None), None)
    )


STEPS = (
    Step("family alone", families_alone, 30.0),
    Step("equal products", products, 15.0),
    Step("equal attention", attention, 10.0),
    Step("equal rows", rows, 5.0),
)
