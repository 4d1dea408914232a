"""How OpenMP's threads wait in long commands: asleep, since a process rarely has its cores alone.

A thread that waits spins by default, for milliseconds, and where processes share cores it spins
in the time of the thread that it waits for. libgomp reads the policy once, when torch is loaded,
and importing lraee loads torch; so the command begins anew with it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""A user who set one of them has chosen."""

COMMANDS = ("calibrate", "embed", "evaluate", "quantize", "report")
"""Minutes of large batches. `serve` answers one image at a time, where waking a thread counts."""


def is_requested(arguments: Sequence[str]) -> bool:
    """Whether these command-line arguments are of a long command, and no policy is chosen."""
    is_long = bool(arguments) and arguments[0] in COMMANDS
    is_help = any(word in ("-h", "--help") for word in arguments)
    is_chosen = any(name in os.environ for name in VARIABLES)
    return is_long and not is_help and not is_chosen and sys.platform == "linux"


def is_own_process(command: Sequence[str]) -> bool:
    """Whether this command line is `lraee …` or `python -m lraee …`: a program that calls the
    command's main must not begin anew itself.
    """
    return "lraee" in {Path(word).name for word in command[1:]}


def restart() -> None:
    """Starts this very command again, its process the same, with threads that wait asleep."""
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
