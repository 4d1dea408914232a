"""Long commands begin anew with threads that sleep while they wait, once, and as the user says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lraee.cli import waiting

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["embed", "photos", "--out", "out"], True),
        (["calibrate"], True),
        (["serve"], False),
        (["--help"], False),
        (["report", "--help"], False),
        ([], False),
    ],
)
def test_long_commands_request_it(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: bool
) -> None:
    for name in waiting.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert waiting.is_requested(arguments) == (expected and sys.platform == "linux")
    for name in waiting.VARIABLES:
        monkeypatch.setenv(name, "1")
        assert not waiting.is_requested(arguments)
        monkeypatch.delenv(name)


def test_a_program_that_calls_main_does_not_begin_anew() -> None:
    assert waiting.is_own_process(["python", "/usr/bin/lraee", "embed", "photos"])
    assert waiting.is_own_process(["python", "-X", "utf8", "-m", "lraee", "embed"])
    assert not waiting.is_own_process(["python", "-c", "from lraee.cli.main import main", "embed"])
    assert not waiting.is_own_process(["python", "-m", "pytest", "tests/cli"])


def test_the_process_stays_the_same_and_keeps_its_input() -> None:
    script = (
        "import importlib.util, os, sys\n"
        "print(os.getpid(), flush=True)\n"
        f"spec = importlib.util.spec_from_file_location('waiting', {waiting.__file__!r})\n"
        "waiting = importlib.util.module_from_spec(spec); spec.loader.exec_module(waiting)\n"
        "if waiting.is_requested(sys.argv[1:]): waiting.restart()\n"
        "print(os.environ['OMP_WAIT_POLICY'], sys.stdin.read())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in waiting.VARIABLES}
    run = subprocess.run(
        [sys.executable, "-c", script, "embed", "-"], cwd=ROOT, check=True, capture_output=True,
        text=True, input="a path", env=environment,
    )  # fmt: skip
    first, second, last = run.stdout.splitlines()
    assert first == second and last == "PASSIVE a path"
