"""Variables that libraries read once, when they are loaded: chosen by the command, before that.

OMP_WAIT_POLICY: how OpenMP's threads wait. A thread that waits spins by default, for milliseconds,
and where processes share cores it spins in the time of the thread that it waits for; a process
rarely has its cores alone for minutes. libgomp reads it when torch is loaded.
TRITON_INTERPRET: see lraee.diagnostics.interpreter; Triton reads it when it is imported.
"""

import os
import sys
from collections.abc import Sequence

from lraee.diagnostics import interpreter

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""A user who set one of them has chosen."""

LONG = ("calibrate", "embed", "evaluate", "quantize", "report")
"""Minutes of large batches. `serve` answers one image at a time, where waking a thread counts."""


def choose(arguments: Sequence[str]) -> dict[str, str]:
    """Variables that these command-line arguments need and the user has not set."""
    chosen = {}
    is_long = bool(arguments) and arguments[0] in LONG
    if is_long and sys.platform == "linux" and not any(name in os.environ for name in POLICIES):
        chosen["OMP_WAIT_POLICY"] = "PASSIVE"
    pairs = zip(arguments, arguments[1:], strict=False)
    if f"--device={interpreter.DEVICE}" in arguments or ("--device", interpreter.DEVICE) in pairs:
        chosen[interpreter.VARIABLE] = "1"
    return chosen
