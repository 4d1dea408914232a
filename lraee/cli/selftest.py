"""The command `lraee selftest`: compares every Triton kernel with its definition."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli import tables
from lraee.cli.common import Show, command, console, line, require_writable
from lraee.diagnostics import interpreter


@command
def selftest(
    device: Annotated[
        interpreter.Device, typer.Option(help="The interpreter takes tiny shapes, and no times.")
    ] = "cuda",
    json_out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, shorter timings.")] = False,
    progress: Show = True,
) -> None:
    """Compare every Triton kernel with its definition on this GPU, then time it beside torch.

    Example: `lraee selftest --device cuda --json-out selftest.json`
    """
    from lraee.diagnostics import selftest
    from lraee.storage.json import write_json

    if json_out is not None:
        require_writable(json_out)
    result = selftest.examine(device, quick=quick, progress=progress)
    if json_out is not None:
        write_json(result, json_out)
    for key in ("gpu", "capability", "driver", "versions"):
        if key in result:
            line(key, result[key])
    for table in tables.of_selftest(result):
        console.print(table)
    if json_out is not None:
        line("written", str(json_out))
    if not result["is_ok"]:
        raise typer.Exit(1)
