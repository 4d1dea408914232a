"""Programs that wait for each other: run by real processes at once, with real atomics.

The interpreter runs one program after another, so that no program ever waits in it. Here each
process runs some programs of one launch on shared memory.
"""

import inspect
import multiprocessing
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from bench.launches import Launch, recorded
from lraee.diagnostics.selftest_inputs import attention, linear, probe
from lraee.kernels import live_rows
from lraee.kernels.configs import Config, ProbeConfig
from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.float_attention import float_attention, float_attention_quantized
from lraee.kernels.int8_linear import (
    int8_linear,
    int8_linear_quantized,
)
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.operands import AttentionOperands
from lraee.kernels.workspace import Workspace
from lraee.ops import reference
from tests.support import assert_same

PROCESSES = 4
CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 60
PLAIN = Config(16, 16, 32, num_warps=4, num_stages=3, group_m=2)
SPLIT = Config(16, 32, 32, num_warps=4, num_stages=3, split_k=3)
WIDE = Config(32, 16, 32, num_warps=1, num_stages=3)
SHAPES = [(50, 48, 97), (17, 80, 600), (33, 33, 64)]


def run_programs(launch: Launch, programs: list[int], start: Any) -> None:
    """What Triton's interpreter does for a whole grid, for these programs of it alone."""
    function = launch.kernel.rewrite()
    arguments = {**launch.arguments, **launch.constants}
    converted = {
        name: value if name in launch.constants else interpreter._implicit_cvt(value)
        for name, value in arguments.items()
    }
    given = inspect.getcallargs(function, **converted)
    scope = interpreter._patch_lang(function)
    interpreter.interpreter_builder.set_grid_dim(*launch.grid, 1, 1)
    start.wait()
    try:
        for program in programs:
            interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
            function(**given)
    finally:
        scope.restore()


def processes(launch: Launch, hands: list[list[int]]) -> list[Any]:
    """A process for each hand of programs, started."""
    for value in launch.arguments.values():
        if isinstance(value, Tensor):
            value.share_memory_()
    start = CONTEXT.Barrier(len(hands))
    started = [
        CONTEXT.Process(target=run_programs, args=(launch, hand, start), daemon=True)
        for hand in hands
    ]
    for process in started:
        process.start()
    return started


def run_at_once(launch: Launch, seed: int) -> None:
    """Runs the programs of a launch in some processes at once; fails where they do not all end.

    They are dealt in any order: a GPU promises none.
    """
    programs = list(range(launch.programs))
    random.Random(seed).shuffle(programs)
    started = processes(launch, [programs[i::PROCESSES] for i in range(PROCESSES)])
    try:
        for process in started:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, f"a process waits for ever or failed: {process.exitcode}"
    finally:
        for process in started:
            process.kill()


def workspace() -> Workspace:
    return Workspace(*(torch.zeros(1 << 14, dtype=torch.int32) for _ in range(2)))


def check(launcher: Callable[..., Any], given: dict[str, Any], expected: Any, seed: int) -> None:
    """One launch by several processes: the definition's bits, and tickets that are zero again."""
    space = workspace()
    with recorded() as launches:
        actual = launcher(**given, space=space)
    assert len(launches) == 1
    run_at_once(launches[0], seed)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, seed=seed)
    assert not space.tickets.any()


configurations = pytest.mark.parametrize("config", [PLAIN, SPLIT, WIDE], ids=["plain", "split", "wide"])  # fmt: skip  # noqa: E501


@configurations
def test_rows_are_quantized_after_their_tiles(config: Config) -> None:
    for seed, (M, N, K) in enumerate(SHAPES):
        given, symmetric = linear(M, N, K, seed), seed % 2 == 0
        expected = reference.quantize_rows(reference.int8_linear(**given), symmetric)
        how = {"symmetric": symmetric, "config": config}
        check(int8_linear_quantized, given | how, expected, seed)


def test_rows_of_attention_are_quantized_after_their_heads() -> None:
    for seed, (B, L, H, d, num_queries) in enumerate([(2, 20, 3, 8, 20), (1, 70, 2, 8, 66), (9, 5, 2, 8, 1)]):  # fmt: skip  # noqa: E501
        qkv = attention(B, L, H, d, seed)
        y = float_attention(qkv, H, num_queries=num_queries)
        operands = AttentionOperands(H)
        given = {"qkv": qkv, "operands": operands, "symmetric": True, "num_queries": num_queries}
        expected = reference.quantize_rows(y.view(-1, H * d), True)
        check(float_attention_quantized, given, expected, seed)


@pytest.mark.parametrize(("H", "B"), [(48, 1), (48, 18), (None, 3)])
def test_the_items_of_a_probe(H: int | None, B: int) -> None:
    config = ProbeConfig(rows=1 if B == 1 else 16, block_d=32)
    given = probe(B, 5, 64, H, 40, 150, seed=B)
    expected = exit_probe(*given)
    check(lambda space: exit_probe(*given, config=config, space=space), {}, expected, seed=B)


def test_the_items_of_a_probe_of_fewer_images() -> None:
    """Programs of images that exited draw items too: 3 of 18, with one block of two left out."""
    given = probe(18, 5, 64, 48, 40, 150, seed=3)
    expected = [part[:3] for part in exit_probe(*given)]
    images = torch.tensor([3], dtype=torch.int32)

    def launch(space: Workspace) -> tuple[Tensor, ...]:
        return tuple(part[:3] for part in exit_probe(*given, space=space))

    with live_rows.using(LiveRows(images, 18)):
        check(launch, {}, expected, seed=3)


def test_parts_of_a_split_tile_are_summed_by_the_last() -> None:
    for seed, (M, N, K) in enumerate([(50, 48, 97), (17, 80, 200)]):
        given = linear(M, N, K, seed)
        check(int8_linear, given | {"config": SPLIT}, reference.int8_linear(**given), seed)


def test_a_program_waits_for_an_item_that_is_not_done() -> None:
    """Else the tests above could pass by luck: an item drawn and never stored blocks all."""
    given = linear(1, 16, 32, 0) | {"symmetric": True, "config": PLAIN, "space": workspace()}
    with recorded() as launches:
        int8_linear_quantized(**given)
    given["space"].tickets[0] = 1  # drawn by a program that does not exist
    (process,) = processes(launches[0], [[0]])
    process.join(2)
    try:
        assert process.is_alive()
    finally:
        process.kill()
