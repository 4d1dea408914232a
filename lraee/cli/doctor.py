"""The command `lraee doctor`: which implementation runs here."""

import json

import typer

from lraee.cli.common import AsJson, command, console, line


@command
def doctor(as_json: AsJson = False) -> None:
    """Say which implementation of each operator runs here, and why the others do not.

    Example: `lraee doctor`, or `lraee doctor --json > doctor.json`
    """
    from lraee.diagnostics import doctor

    found = doctor.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for key in ("machine", "threads", "versions"):
        line(key, str(found[key]))
    line("towers", "; ".join(found["towers"]))
    for level, state in found["isa"].items():
        line(f"isa {level}", state)
    for row in found["cuda"]:
        line("cuda", row)
    for group in doctor.grouped(found["operators"]):
        console.print(f"\non {group.device} tensors: {group.runs}", markup=False, soft_wrap=True)
        console.print(f"    for {', '.join(group.operators)}", markup=False, soft_wrap=True)
        for name, reason in group.others.items():
            console.print(f"    not {name}: {reason}", markup=False, soft_wrap=True)
