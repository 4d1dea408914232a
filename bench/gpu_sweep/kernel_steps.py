"""Times of kernels beside what torch has: attention, products, rows, blocks."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_sweep import variants
from bench.gpu_sweep.run import Context, Item, Step, Values, line_of, timed
from bench.shapes import B16, B32, L14, Linear, Tower
from lraee.diagnostics import selftest_inputs, tuning
from lraee.diagnostics.tuned_layers import Epilogue, Operands, TunedLayer
from lraee.kernels.int8_block import int8_block
from lraee.kernels.operands import BlockOperands

TOWERS = (B32, B16, L14)
BATCHES = (32, 128, 8, 1)
"""Those that matter most first: time may end."""
TINY = Tower("tiny", "tiny", L=5, D=32, num_heads=2, layers=2, E=16, image_px=56, patch_px=28)
COPIES = 12
CUBLAS = "cuBLAS float16"
PRODUCT_S = 8.0
"""For all candidates of one shape, once they are compiled."""
EPILOGUES = {
    "attn.qkv": Epilogue(), "attn.out": Epilogue("none", True), "mlp.fc1": Epilogue("gelu"),
    "mlp.fc2": Epilogue("none", True),
}  # fmt: skip


def tower_batches(context: Context) -> Iterator[tuple[Tower, int]]:
    """Real towers, or a tiny one."""
    pairs = itertools.product(BATCHES, TOWERS)
    yield from [(TINY, 1)] if context.is_dry else [(tower, batch) for batch, tower in pairs]


def copies(context: Context) -> int:
    """Inputs of a call, so that none lies in a cache."""
    return 1 if context.is_dry else COPIES


def in_turn(function: Callable[[Tensor], object], inputs: list[Tensor]) -> Callable[[], object]:
    """A call that goes through all inputs."""

    def call() -> object:
        for one in inputs[:-1]:
            function(one)
        return function(inputs[-1])

    return call


def attention(context: Context) -> Iterator[Item]:
    """Each kernel of attention, and torch's."""
    names = (*(one.name for one in variants.ATTENTION), variants.RIVAL)
    for tower, batch in tower_batches(context):
        run = partial(_time_attention, context, tower, batch)
        yield Item(f"{tower.name} L={tower.L} batch {batch}", run, names)


def _time_attention(context: Context, tower: Tower, batch: int) -> Mapping[str, Values]:
    count, H = copies(context), tower.num_heads
    shape, device = (batch, tower.L, 3 * tower.D), context.target.device
    inputs = [torch.randn(*shape, dtype=context.dtype, device=device) for _ in range(count)]
    calls = {
        one.name: in_turn(lambda x, run=one.run: run(x, H), inputs)  # type: ignore[misc]
        for one in variants.ATTENTION
    }
    calls[variants.RIVAL] = in_turn(lambda x: variants.rival(x, H), inputs)
    return timed(context, calls, count)


def products(context: Context) -> Iterator[Item]:
    """Every candidate of every linear with the tower's epilogue, and cuBLAS with torch's."""
    for tower, batch in tower_batches(context):
        for linear in tower.linears:
            epilogue = EPILOGUES[linear.name]
            shape = f"M={batch * tower.L} N={linear.N} K={linear.K} {epilogue.name}"
            run = partial(_time_products, context, linear, batch * tower.L, epilogue)
            yield Item(shape, run, (CUBLAS,))


def _time_products(
    context: Context, linear: Linear, M: int, epilogue: Epilogue
) -> Mapping[str, Values]:
    layer = TunedLayer(linear.N, linear.K, epilogue)
    effort = tuning.Effort((1,), copies(context), 1 if context.is_dry else 18)
    (tuned,) = tuning.tune(
        [layer], M, context.target, context.rounds(0.15), effort=effort, dtype=context.dtype,
        budget_s=PRODUCT_S,
    )  # fmt: skip
    lines: dict[str, Values] = {}
    for one in tuned.tried:
        name = f"{one.family} {one.config}"
        is_pick = one.config == tuned.pick.config and one.family == tuned.pick.family
        facts = {
            "family": one.family, "config": one.config, "M": M, "N": linear.N, "K": linear.K,
            "epilogue": epilogue.name, "is_pick": is_pick, "equal": one.timing is not None,
        }  # fmt: skip
        line = {"refused": one.error} if one.timing is None else line_of(one.timing)
        lines[name] = {**facts, **line}
    return {**lines, CUBLAS: _time_cublas(context, layer, M)}


def _time_cublas(context: Context, layer: TunedLayer, M: int) -> Values:
    """F.linear with bias, then activation and residual as torch has them."""
    given = Operands.of(layer, M, copies(context), context.dtype, context.target.device)
    x = given.x[0].to(context.dtype)
    weights = [linear.w.to(context.dtype) for linear in given.linears]
    bias = torch.zeros(layer.N, device=x.device, dtype=context.dtype)
    residual: Tensor | None = given.options.get("residual")

    def call(w: Tensor) -> Tensor:
        y = F.linear(x, w, bias)
        y = F.gelu(y) if layer.epilogue.activation == "gelu" else y
        return y if residual is None else y + residual

    (line,) = timed(context, {"": in_turn(call, weights)}, len(weights)).values()
    return {**line, "tops": round(2 * M * layer.N * layer.K / line["us"] / 1e6, 1)}


def rows(context: Context) -> Iterator[Item]:
    """Row-wise kernels at the widths of towers, and torch's norm."""
    for tower, batch in tower_batches(context):
        for width in (tower.D, 4 * tower.D):
            names = tuple(one.name for one in variants.ROWS)
            run = partial(_time_rows, context, batch * tower.L, width)
            yield Item(f"{batch * tower.L}x{width}", run, (*names, "torch norm"))


def _time_rows(context: Context, M: int, width: int) -> Mapping[str, Values]:
    count = copies(context)
    inputs = [
        torch.randn(M, width, device=context.target.device).to(context.dtype) for _ in range(count)
    ]
    calls = {one.name: in_turn(one.run, inputs) for one in variants.ROWS}
    calls["torch norm"] = in_turn(variants.rival_norm, inputs)
    return timed(context, calls, count)


def blocks(context: Context) -> Iterator[Item]:
    """A whole block as launched now; each choice of launches where there is one to make."""
    for tower, batch in tower_batches(context):
        yield Item(f"{tower.name} batch {batch}", partial(_time_block, context, tower, batch))


def block_variants(block: BlockOperands) -> dict[str, BlockOperands]:
    """The block with each kind of attention that it may have."""
    if "attention" not in BlockOperands._fields:
        return {"": block}
    return {
        ("" if kind == "float" else kind): block._replace(**{"attention": kind})
        for kind in ("float", "int8")
    }


def _time_block(context: Context, tower: Tower, batch: int) -> Mapping[str, Values]:
    H = tower.num_heads
    x, block = selftest_inputs.block(batch, tower.L, H, tower.D // H, 1, context.target.device)
    x = x.to(context.dtype)
    calls = {
        name: partial(int8_block, x, each) for name, each in block_variants(block).items()
    }  # fmt: skip
    return timed(context, calls)


STEPS = (
    Step("attention", attention, 4.0),
    Step("products", products, 4.0),
    Step("rows", rows, 3.0),
    Step("blocks", blocks, 3.0),
)
