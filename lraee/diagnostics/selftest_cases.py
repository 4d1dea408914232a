"""What `lraee selftest` runs: each kernel, with each config of the tables, on a few shapes.

Inputs are made on the CPU, where the definition runs too; the kernel gets poisoned copies on its
device, and what it gives is compared on the CPU again.
"""

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor

from lraee.diagnostics import selftest_inputs
from lraee.diagnostics.guarded_memory import guarded_outputs, is_intact, poisoned, poisoned_all
from lraee.diagnostics.selftest_exits import exit_cases
from lraee.diagnostics.selftest_results import QUANTIZED, ROW_PADS, exact, first_of, label, short
from lraee.diagnostics.selftest_rows import row_cases
from lraee.diagnostics.selftest_sizes import Case, Difference, Sizes, Target
from lraee.kernels import (
    configs,
    exit_probe,
    float_attention,
    float_configs,
    float_linear,
    int8_attention,
    int8_block,
    int8_linear,
    layer_norm_quantize,
    quantize_rows,
    workspace,
)
from lraee.kernels.configs import Config, Shape
from lraee.kernels.measured import MEASURED
from lraee.kernels.operands import AttentionOperands
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from lraee.ops.backend import operators
from lraee.ops.checked import Activation

ACTIVATIONS = get_args(Activation)


def cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """Every case, cheap kernels first. Nothing runs before `difference` is called."""
    yield from row_cases(target, sizes)
    yield from weight_cases(target, sizes)
    yield from linear_cases(target, sizes)
    yield from quantizing_cases(target, sizes)
    yield from float_linear_cases(target, sizes)
    yield from attention_cases(target, sizes)
    yield from float_attention_cases(target, sizes)
    yield from block_cases(target, sizes)
    yield from probe_cases(target, sizes)
    yield from exit_cases(target, sizes)


def weight_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """pack_weight and unpack_weight of the device: there and back, and the sums of the rows."""
    for seed, (N, K) in enumerate(sizes.layers):

        def find(N: int = N, K: int = K, seed: int = seed) -> str | None:
            # Not registered for CUDA alone: the definition runs there, and in the interpreter
            ops = torch.ops.lraee if target.device.type == "cuda" else reference
            w_q = selftest_inputs.linear(1, N, K, seed)["linear"].w
            w, w_sum = ops.pack_weight(w_q.to(target.device))
            back = ops.unpack_weight(w, N, K)
            expected = (w_q, w_q, w_q.long().sum(1).to(torch.int32))
            return exact(("w", "back", "w_sum"), (w, back, w_sum), expected)

        yield Case("pack_weight, unpack_weight", "", f"N={N} K={K}", find)


def linear_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """int8_linear with every row of the table, split or not, and every part of its epilogue."""
    table = configs.TABLE[target.arch.capability]
    rows = dict.fromkeys(row for bucket in table for row in bucket)
    for measured in MEASURED.get(target.arch.capability, {}).values():
        rows |= dict.fromkeys(Config(*numbers) for _, numbers in measured)
    seeds = itertools.count()
    for M, (N, K) in itertools.product(sizes.rows, sizes.layers):
        for row in rows:
            if configs.legal(row, Shape(M, N, K), target.arch):
                seed = next(seeds)
                activation = ACTIVATIONS[seed // 3 % len(ACTIVATIONS)]
                find = _linear_difference(target, M, N, K, seed, activation, row)
                epilogue = _epilogue(selftest_inputs.linear(1, 1, 1, seed), activation)
                yield Case("int8_linear", label(row), f"M={M} N={N} K={K} {epilogue}", find)


def _linear_difference(
    target: Target, M: int, N: int, K: int, seed: int, activation: str, config: Config
) -> Difference:
    def find() -> str | None:
        given = selftest_inputs.linear(M, N, K, seed)
        expected = reference.int8_linear(**given, activation=activation)
        device = target.device
        guarded = poisoned_all(given, ROW_PADS[seed % 3], device)
        space = _space(M, N, config, device)
        with guarded_outputs():
            actual = int8_linear.int8_linear(
                **guarded, activation=activation, config=config, space=space
            )
        bound = bounds.of_linear(given, activation)
        return first_of([("y", actual, expected, bound)]) or _space_difference(space)

    return find


def quantizing_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """int8_linear with its rows quantized in its launch: the bits of quantize_rows after it."""
    seeds = itertools.count(1)
    for M, (N, K) in itertools.product(sizes.rows, sizes.layers):
        for row in configs.TABLE[target.arch.capability][configs.bucket(M)]:
            if configs.legal(row, Shape(M, N, K), target.arch):
                seed = next(seeds)
                given = selftest_inputs.linear(1, 1, 1, seed)
                symmetric = "symmetric" if seed % 2 == 0 else "asymmetric"
                shape = f"M={M} N={N} K={K} {symmetric} {_epilogue(given, 'none')}"
                find = _quantizing_difference(target, M, N, K, seed, row)
                yield Case("int8_linear_quantized", label(row), shape, find)


def _quantizing_difference(
    target: Target, M: int, N: int, K: int, seed: int, config: Config
) -> Difference:
    def find() -> str | None:
        symmetric = seed % 2 == 0
        given = selftest_inputs.linear(M, N, K, seed)
        expected = reference.quantize_rows(reference.int8_linear(**given), symmetric)
        guarded = poisoned_all(given, ROW_PADS[seed % 3], target.device)
        space = _space(M, N, config, target.device, quantizes=True)
        with guarded_outputs():
            actual = int8_linear.int8_linear_quantized(
                **guarded, symmetric=symmetric, config=config, space=space
            )
        return exact(QUANTIZED, actual, expected) or _space_difference(space)

    return find


def _space(
    M: int, N: int, config: Config, device: torch.device, *, quantizes: bool = False
) -> workspace.Workspace | None:
    """A workspace with not an element more than the launch needs, between poison."""
    if config.split_k == 1 and not quantizes:
        return None
    row_blocks = math.ceil(M / config.block_m)
    tiles = row_blocks * math.ceil(N / config.block_n) if config.split_k > 1 else 0
    size = tiles * config.split_k * config.block_m * config.block_n
    count = tiles + (1 + row_blocks if quantizes else 0)
    partials, tickets = (torch.zeros(n, dtype=torch.int32) for n in (size, count))
    return workspace.Workspace(*poisoned_all([partials, tickets], device=device))


def _space_difference(space: workspace.Workspace | None) -> str | None:
    if space is None:
        return None
    if not is_intact(space.partials) or not is_intact(space.tickets):
        return "workspace: stored out of bounds"
    return "workspace: tickets are not zero after the launch" if space.tickets.any() else None


def float_linear_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """float_linear, its segments in one program or in many, w by row and by step."""
    seeds = itertools.count()
    for M, (N, K) in itertools.product(sizes.rows, sizes.layers):
        for splits in {1, -(-K // float_configs.SEGMENT_K)}:
            seed = next(seeds)
            x, w, bias = selftest_inputs.float_linear(M, N, K, seed)
            row = float_configs.float_config(K, x.element_size())
            find = _float_linear_difference(target, (x, w, bias), seed, row, splits)
            parts = f"{'no ' if bias is None else ''}bias splits={splits}"
            layout = "by row" if w.is_contiguous() else "by step"
            shape = f"M={M} N={N} K={K} {short(x.dtype)} w {layout} {parts}"
            yield Case("float_linear", label(row), shape, find)


def _float_linear_difference(
    target: Target, given: tuple[Tensor, Tensor, Tensor | None], seed: int, config: Any, splits: int
) -> Difference:
    def find() -> str | None:
        x, w, bias = given
        size = -(-x.shape[0] // config.block_m) * -(-w.shape[0] // config.block_n)
        if splits * size * config.block_m * config.block_n > configs.WORKSPACE_PARTIALS:
            return None
        expected = reference.float_linear(*(None if t is None else t.float() for t in given))  # type: ignore[arg-type]
        there = [None if t is None else t.to(target.device) for t in (w, bias)]
        with guarded_outputs():
            actual = float_linear.float_linear(
                poisoned(x, ROW_PADS[seed % 3], target.device), *there,
                config=config, splits=splits,
            )  # fmt: skip
        return first_of([("y", actual, expected.to(x.dtype), bounds.of_float_linear(x, w, bias))])

    return find


def block_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """int8_block: the bits of the operators that it is made of, one after the other."""
    for seed, (B, L, H, d) in enumerate(sizes.attention[:2]):
        for images, first_only, attention in (
            (B, False, "float"), (2 * B + 1, False, "int8"), (B, True, "float"),
        ):  # fmt: skip
            part = " first token" if first_only else ""
            shape = f"B={images} L={L} D={H * d} H={H} {attention} attention{part}"
            find = _block_difference(target, (images, L, H, d), seed, attention, first_only)
            yield Case("int8_block", "", shape, find)


def _block_difference(
    target: Target, shape: tuple[int, int, int, int], seed: int, attention: Any, first_only: bool
) -> Difference:
    def find() -> str | None:
        x, operands = selftest_inputs.block(*shape, seed, target.device)
        given = (x, operands._replace(attention=attention), first_only)
        ops = operators("auto") if target.device.type == "cuda" else launchers()
        expected = reference.int8_block(*given, operators=ops)
        with guarded_outputs():
            actual = int8_block.int8_block(*given)
        return exact(("y",), (actual,), (expected.cpu(),))

    return find


def launchers() -> Any:
    """The launchers by name, which run in the interpreter on tensors of the CPU."""
    kernels = (quantize_rows, layer_norm_quantize, int8_linear, int8_attention, float_attention)
    by_name = {module.__name__.split(".")[-1]: module for module in kernels}
    return SimpleNamespace(**{name: getattr(module, name) for name, module in by_name.items()})


def attention_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """int8_attention, causal and not, with each config that a number of heads would choose."""
    for seed, ((B, L, H, d), causal) in enumerate(
        itertools.product(sizes.attention, (False, True))
    ):
        dtype = selftest_inputs.TYPES[seed % 3]
        shape = f"B={B} L={L} H={H} d={d} {short(dtype)}{' causal' if causal else ''}"
        row = configs.attention_config(L, d, causal)
        find = _attention_difference(target, (B, L, H, d), seed, causal, row)
        yield Case("int8_attention", label(row), shape, find)
        find = _key_mask_difference(target, (B, L, H, d), seed, causal, row)
        yield Case("int8_attention", label(row), f"{shape} key mask", find)


def _attention_difference(
    target: Target, shape: tuple[int, int, int, int], seed: int, causal: bool, config: Any
) -> Difference:
    def find() -> str | None:
        qkv = selftest_inputs.attention(*shape, seed)
        H = shape[2]
        expected = reference.int8_attention(qkv, H, causal)
        with guarded_outputs():
            given = poisoned(qkv, ROW_PADS[seed % 3], target.device)
            actual = int8_attention.int8_attention(given, H, causal, config=config)
        return first_of([("y", actual, expected, bounds.of_attention(qkv, expected, H))])

    return find


def _key_mask_difference(
    target: Target, shape: tuple[int, int, int, int], seed: int, causal: bool, config: Any
) -> Difference:
    def find() -> str | None:
        qkv, H = selftest_inputs.attention(*shape, seed), shape[2]
        _, key_mask = selftest_inputs.rope_and_mask(*shape, seed)
        expected = reference.int8_attention(qkv, H, causal, None, key_mask)
        with guarded_outputs():
            there, mask = poisoned_all([qkv, key_mask], device=target.device)
            actual = int8_attention.int8_attention(there, H, causal, None, mask, config=config)
        return first_of([("y", actual, expected, bounds.of_attention(qkv, expected, H))])

    return find


def float_attention_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """float_attention, plain and with all that may be masked or rotated."""
    for seed, (B, L, H, d) in enumerate(sizes.attention):
        shape = f"B={B} L={L} H={H} d={d} {short(selftest_inputs.TYPES[seed % 3])}"
        for has_all in (False, True) if d % 2 == 0 else (False,):
            find = _float_attention_difference(target, (B, L, H, d), seed, has_all)
            parts = " causal, rope and key mask" if has_all else ""
            yield Case("float_attention", "", f"{shape}{parts}", find)


def _float_attention_difference(
    target: Target, shape: tuple[int, int, int, int], seed: int, has_all: bool
) -> Difference:
    def find() -> str | None:
        qkv, H = selftest_inputs.attention(*shape, seed), shape[2]
        given = [qkv, *selftest_inputs.rope_and_mask(*shape, seed)] if has_all else [qkv]
        rope = given[1] if has_all else None
        expected = reference.float_attention(qkv, H, has_all, *given[1:])
        with guarded_outputs():
            there, *others = poisoned_all(given, device=target.device)
            actual = float_attention.float_attention(there, H, has_all, *others)
            rows = float_attention.float_attention_quantized(
                there, AttentionOperands(H, has_all, *others), symmetric=has_all
            )
        quantized = reference.quantize_rows(actual.cpu().flatten(0, 1), has_all)
        bound = bounds.of_float_attention(qkv, expected, H, rope)
        return first_of([("y", actual, expected, bound)]) or exact(QUANTIZED, rows, quantized)

    return find


def probe_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """exit_probe on the mean alone and with the class token, one image a program and sixteen."""
    for seed, (shape, has_class_token) in enumerate(itertools.product(sizes.probes, (False, True))):
        B, L, D, H, E, K = shape
        layers = "one layer" if H is None else f"H={H}"
        inputs = "mean and class token" if has_class_token else "mean"
        text = f"B={B} L={L} D={D} {layers} E={E} K={K} {inputs}"
        for row in dict.fromkeys(configs.probe_config(n, target.arch) for n in (1, 2)):
            find = _probe_difference(target, shape, seed, has_class_token, row)
            yield Case("exit_probe", label(row), text, find)


def _probe_difference(
    target: Target, shape: tuple[int, int, int, int | None, int, int], seed: int,
    has_class_token: bool, config: Any,
) -> Difference:  # fmt: skip
    def find() -> str | None:
        z, head = selftest_inputs.probe(*shape, seed, has_class_token)
        wanted = reference.exit_probe(z, head)
        device = target.device
        space = workspace.of_current_stream(device)
        with guarded_outputs():
            embedding, top1, confidence, margin, variance, score = exit_probe.exit_probe(
                poisoned(z, ROW_PADS[seed % 3], device),
                *poisoned_all([head], device=device), config=config, space=space,
            )  # fmt: skip
        result = {"top1": top1, "confidence": confidence, "margin": margin, "score": score}
        decided = bounds.decision(embedding.cpu(), variance.cpu(), head)
        limits = bounds.of_decision(shape[-1])
        first = first_of([
            ("variance", variance, wanted[4], 0.0),
            ("embedding", embedding, wanted[0], bounds.of_embedding(z, head)),
            *((name, result[name], decided[name], limits[name]) for name in result),
        ])  # fmt: skip
        if first is None and space.tickets.any():
            return "workspace: tickets are not zero after the launch"
        return first

    return find


def _epilogue(given: dict[str, Any], activation: str) -> str:
    """What of the epilogue is there, and the type of the result."""
    operands = given | given["linear"]._asdict()
    names = ("x_zero", "bias", "layer_scale", "residual")
    there = [name for name in names if operands[name] is not None]
    return " ".join([*there, activation, short(given["out_dtype"])])
