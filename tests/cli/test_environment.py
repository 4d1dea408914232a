"""Variables that libraries read at their import: no torch is loaded before they are set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lraee.cli import environment
from lraee.diagnostics import interpreter

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.POLICIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's variables")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["embed", "photos", "--out", "out"], True),
        (["calibrate"], True),
        (["serve"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_threads_of_long_commands_wait_asleep(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: bool
) -> None:
    assert environment.choose(arguments) == ({"OMP_WAIT_POLICY": "PASSIVE"} if expected else {})
    for name in environment.POLICIES:
        monkeypatch.setenv(name, "1")
        assert environment.choose(arguments) == {}
        monkeypatch.delenv(name)


def test_the_interpreter_is_chosen_where_it_is_the_device() -> None:
    expected = {"TRITON_INTERPRET": "1"}
    assert environment.choose(["selftest", "--device", "interpreter"]) == expected
    assert environment.choose(["selftest", "--quick", "--device=interpreter"]) == expected
    assert environment.choose(["selftest", "--device", "cuda"]) == {}
    assert environment.choose(["selftest", "--device"]) == {}
    assert environment.choose(["doctor", "--data", "interpreter"]) == {}


def run(script: str) -> list[str]:
    names = (*environment.POLICIES, interpreter.VARIABLE)
    variables = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=variables
    )
    return result.stdout.splitlines()


def test_the_command_line_loads_no_library_before_a_command_runs() -> None:
    script = (
        "import sys, lraee.cli.main\n"
        "print([name for name in ('torch', 'triton', 'open_clip', 'numpy') if name in sys.modules])"
    )
    assert run(script) == ["[]"]


def test_public_names_load_when_they_are_used() -> None:
    script = (
        "import lraee, sys\n"
        "print('torch' in sys.modules, set(lraee.__all__) <= set(dir(lraee)))\n"
        "print(all(getattr(lraee, name) is not None for name in lraee.__all__))\n"
        "print(lraee.accelerate.__module__, lraee.ops.__name__, lraee.load is lraee.load)\n"
        "try: lraee.accelerat\n"
        "except AttributeError as error: print(error)\n"
    )
    assert run(script) == [
        "False True", "True", "lraee.model.accelerate lraee.ops True",
        "module 'lraee' has no attribute 'accelerat'",
    ]  # fmt: skip
