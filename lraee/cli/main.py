"""The command `lraee`: one file per command beside this one.

Commands import what they need when they run: `lraee --help` loads no torch.

Exit codes: 0 done, 1 could not be done (one line says why), 2 wrong usage.
"""

import importlib
import io
import logging
import os
import sys

from lraee.cli import environment
from lraee.cli.common import app

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
    os.environ.update(environment.choose(sys.argv[1:]))  # no command has imported torch yet
    app()
