"""The machine code of products for sm_90: waits, parts of warps, spills. In a process of its own,
for here kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.products_sass import Facts, failures

ROOT = Path(__file__).parents[2]
SPLIT = [{"copies": 3, "products": 0}, *[{"copies": 0, "products": 1}] * 2]


@pytest.mark.slow
def test_products_pass_their_gates() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.products_sass"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["fails"] for line in lines] == [[]] * len(lines) and len(lines) in (2, 6)


def test_gates_see_what_they_are_for() -> None:
    good = Facts(168, 200_000, 0, [0, 0], SPLIT)
    assert failures("persistent", good) == []
    for change in (
        {"spills": 2}, {"registers": 255}, {"shared": 240_000}, {"parts": []},
        {"parts": [{"copies": 3, "products": 1}]}, {"parts": SPLIT[:2]},
        {"parts": [SPLIT[0], *[{"copies": 1, "products": 1}] * 2]},
    ):  # fmt: skip
        assert len(failures("persistent", Facts(**vars(good) | change))) == 1, change
    assert failures("persistent", Facts(**vars(good) | change), has_residual=True) == []
    assert failures("gluon", Facts(168, 200_000, 0, [1, 0, 1, 0], [])) == []
    assert failures("gluon", good) == ["every wgmma is waited for: [0, 0]"]
