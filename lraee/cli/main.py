"""The command `lraee`: one file per command beside this one.

Exit codes: 0 done, 1 could not be done (one line says why), 2 wrong usage.
"""

import importlib
import io
import logging
import sys

from lraee.cli import waiting
from lraee.cli.common import app
from lraee.diagnostics import interpreter
from lraee.measurement.machine import limit_threads

COMMANDS = (
    "doctor",
    "demo",
    "quantize",
    "calibrate",
    "evaluate",
    "bench",
    "selftest",
    "tune",
    "report",
    "embed",
    "merge",
    "serve",
    "index",
)
"""Modules of this package, in the order of `lraee --help`; each registers its command."""

for _name in COMMANDS:
    importlib.import_module(f"lraee.cli.{_name}")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a name that cannot be printed costs no result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    if interpreter.is_requested(sys.argv[1:]):
        interpreter.restart()
    if waiting.is_own_process(sys.orig_argv) and waiting.is_requested(sys.argv[1:]):
        waiting.restart()
    limit_threads()
    app()
