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

    result = doctor.examine()
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for key in ("machine", "threads", "versions"):
        line(key, str(result[key]))
    line("towers", "; ".join(result["towers"]))
    line("text towers", "; ".join(result["text_towers"]))
    for level, state in result["isa"].items():
        line(f"isa {level}", state)
    for row in result["cuda"]:
        line("cuda", row)
    for key in ("tilings", "float16"):
        for row in result[key]:
            line(key, row)
    for group in doctor.grouped(result["operators"]):
        console.print(f"\non {group.device} tensors: {group.runs}", markup=False, soft_wrap=True)
        console.print(f"    for {', '.join(group.operators)}", markup=False, soft_wrap=True)
        for name, reason in group.others.items():
            console.print(f"    not {name}: {reason}", markup=False, soft_wrap=True)
