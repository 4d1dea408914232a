"""Programs that wait for each other: run by real processes at once, with real atomics.

The interpreter runs one program after another, so that nobody ever waits in it. Here each process
runs some programs of one launch on shared memory.
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
from lraee import reference
from lraee.kernels import configs
from lraee.kernels.configs import Config
from lraee.kernels.int8_linear import int8_linear, int8_linear_from_float
from lraee.kernels.workspace import Workspace
from lraee.selftest_inputs import float_rows, linear
from tests.support import assert_same

PROCESSES = 4
CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 60
PLAIN = Config(16, 16, 32, num_warps=4, num_stages=3, group_m=2)
SPLIT = Config(16, 32, 32, num_warps=4, num_stages=3, split_k=3)
SMALL_PIECES = Config(32, 16, 32, num_warps=1, num_stages=3)


def run_programs(launch: Launch, programs: list[tuple[int, int]], start: Any) -> None:
    """What Triton's interpreter does for a whole grid, for these programs of it alone."""
    function = launch.kernel.rewrite()
    arguments = {**launch.arguments, **launch.constants}
    converted = {
        name: value if name in launch.constants else interpreter._implicit_cvt(value)
        for name, value in arguments.items()
    }
    given = inspect.getcallargs(function, **converted)
    scope = interpreter._patch_lang(function)
    interpreter.interpreter_builder.set_grid_dim(*launch.grid, 1)
    start.wait()
    try:
        for x, y in programs:
            interpreter.interpreter_builder.set_grid_idx(x, y, 0)
            function(**given)
    finally:
        scope.restore()


def run_at_once(launch: Launch, hands: list[list[tuple[int, int]]]) -> None:
    """Runs each hand of programs in a process of its own; fails where they do not all end."""
    for value in launch.arguments.values():
        if isinstance(value, Tensor):
            value.share_memory_()
    start = CONTEXT.Barrier(len(hands))
    processes = [
        CONTEXT.Process(target=run_programs, args=(launch, hand, start), daemon=True)
        for hand in hands
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, f"a process waits for ever or failed: {process.exitcode}"
    finally:
        for process in processes:
            process.kill()


def deal(launch: Launch, seed: int) -> list[list[tuple[int, int]]]:
    """The programs of a launch among the processes, in any order: a GPU promises none."""
    programs = [(x, y) for x in range(launch.grid[0]) for y in range(launch.grid[1])]
    random.Random(seed).shuffle(programs)
    return [programs[i::PROCESSES] for i in range(PROCESSES)]


def workspace() -> Workspace:
    return Workspace(*(torch.zeros(1 << 14, dtype=torch.int32) for _ in range(2)))


def check(
    launcher: Callable[..., Tensor], x: list[Any], given: dict[str, Any], seed: int, config: Config
) -> None:
    """One launch by several processes: the definition's bits, and tickets that are zero again."""
    quantized = reference.quantize_rows(*x) if len(x) == 2 else x
    expected = reference.int8_linear(*quantized, **given)
    space = workspace()
    with recorded() as launches:
        y = launcher(*x, **given, config=config, space=space)
    assert len(launches) == 1
    run_at_once(launches[0], deal(launches[0], seed))
    assert_same(y, expected, seed=seed, config=config)
    assert not space.tickets.any()


def without_rows(given: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    given = dict(given)
    return given, [given.pop(name) for name in ("x_q", "x_scale", "x_zero")]


@pytest.mark.parametrize("config", [PLAIN, SPLIT, SMALL_PIECES], ids=["plain", "split", "pieces"])
def test_rows_are_quantized_together(config: Config) -> None:
    for seed, (M, N, K) in enumerate([(50, 48, 97), (17, 80, 600), (33, 33, 64)]):
        given, _ = without_rows(linear(M, N, K, seed))
        x = float_rows(M, K, seed)
        check(int8_linear_from_float, [x, seed % 2 == 0], given, seed, config)


def test_parts_of_a_split_tile_meet() -> None:
    for seed, (M, N, K) in enumerate([(50, 48, 97), (17, 80, 200)]):
        given, quantized = without_rows(linear(M, N, K, seed))
        check(int8_linear, quantized, given, seed, SPLIT)


def test_a_piece_that_is_not_done_is_waited_for() -> None:
    """Else the tests above could pass by luck: with a piece that nobody brings, nobody goes on."""
    given, _ = without_rows(linear(16, 16, 32, 0))
    space = workspace()
    with recorded() as launches:
        int8_linear_from_float(float_rows(16, 32, 0), True, **given, config=PLAIN, space=space)
    space.tickets[0] = 1  # taken by a program that never was
    for value in launches[0].arguments.values():
        if isinstance(value, Tensor):
            value.share_memory_()
    start = CONTEXT.Barrier(1)
    process = CONTEXT.Process(target=run_programs, args=(launches[0], [(0, 0)], start), daemon=True)
    process.start()
    process.join(2)
    try:
        assert process.is_alive()
    finally:
        process.kill()
    assert space.tickets[: configs.ROW_BLOCK_TICKETS].tolist()[2] == 0
