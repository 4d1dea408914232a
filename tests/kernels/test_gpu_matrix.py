"""Compile-only proof: a fixed part of bench/gpu_matrix.py passes its gates and golden records.

In a process of its own, for here kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, module: str = "bench.gpu_matrix") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def check(result: subprocess.CompletedProcess[str], least: int) -> None:
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(result.stdout.splitlines()[-1].split()[0]) >= least


def test_fixed_part_of_the_matrix() -> None:
    check(run("--subset", "--arch", "80", "90"), least=12)


def test_row_kernels_take_at_most_32_instructions_a_value() -> None:
    """Of the widths that compile fastest; python -m bench.row_instructions counts all."""
    result = run("--arch", "80", "90", "--width", "768", module="bench.row_instructions")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 4


@pytest.mark.slow
def test_row_kernels_of_every_width() -> None:
    result = run(module="bench.row_instructions")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_whole_matrix() -> None:
    """In two processes: a compilation takes one core for two seconds and more."""
    halves = (("80", "86", "89"), ("90", "100", "120"))
    with ThreadPoolExecutor(len(halves)) as pool:
        for result in pool.map(lambda archs: run("--arch", *archs), halves):
            check(result, least=150)


def test_golden_records_pass_the_gates() -> None:
    """Without compiling: what is committed holds no spill, and every family."""
    for path in (ROOT / "bench" / "golden").glob("gpu_matrix_triton-*.json"):
        records = json.loads(path.read_text())
        assert {name.split()[0] for name in records} == {
            f"sm_{capability}" for capability in (80, 86, 89, 90, 100, 120)
        }
        for name, record in records.items():
            assert record["spills"] == record["local"] == record["byte_loads"] == 0, name
