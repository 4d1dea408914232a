"""A check in a process of its own, with a time limit: a kernel that hangs ends nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

OUTPUT_CHARS = 300
"""Of the end of an error that is handed on."""


def failure(
    module: str,
    arguments: Sequence[str] = (),
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> str | None:
    """Why `python -m module arguments` did not end with 0, in one line; None where it did."""
    return run(module, arguments, timeout_s=timeout_s, environment=environment)[0]


def run(
    module: str,
    arguments: Sequence[str] = (),
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[str | None, str]:
    """What `failure` says of the child, and what it wrote to stdout.

    The child leads a process group of its own, which is killed whole when the time is over: a
    kernel that waits for ever keeps its process, and nothing else, from ending.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=None if environment is None else dict(environment), start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"no end within {timeout_s:g} s", ""
    if child.returncode == 0:
        return None, output
    lines = (errors.strip() or output.strip()).splitlines() or [f"exit code {child.returncode}"]
    return lines[-1][-OUTPUT_CHARS:], output


def last_json(output: str) -> Any:
    """The last line of what a child wrote, read as JSON; None where there is none."""
    lines = output.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
