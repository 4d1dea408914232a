"""The command `lraee tune`: times the kernels of a tower's linears on this GPU."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import Model, Pretrained, Show, command, line, require_writable
from lraee.diagnostics import interpreter


@command
def tune(
    model: Model = "ViT-B-32",
    pretrained: Pretrained = None,
    tower: Annotated[
        bool, typer.Option(help="Also time the whole tower beside torch's float16.")
    ] = True,
    budget_s: Annotated[float, typer.Option(min=1.0, help="Seconds, compiling included.")] = 600.0,
    device: Annotated[
        interpreter.Device,
        typer.Option(help="The interpreter runs every step on tiny shapes and stores nothing."),
    ] = "cuda",
    json_out: Annotated[Path | None, typer.Option(help="Where all times go.")] = None,
    progress: Show = True,
) -> None:
    """Find the fastest kernel of each linear of a tower on this GPU, and keep it for all runs.

    Weights are random where no `--pretrained` is given: time does not depend on them. The table
    lies in the user's cache (LRAEE_CACHE, or ~/.cache/lraee) and holds for this version of the
    kernels; `lraee doctor` names it.

    Example: `lraee tune --model ViT-L-14`
    """
    from lraee.diagnostics import tune_run
    from lraee.storage.json import write_json
    from lraee.zoo.opening import open_model

    if json_out is not None:
        require_writable(json_out)
    target = tune_run.find_target(device)
    opened = open_model(model, pretrained, may_be_random=True)
    result = tune_run.run(
        opened.model, target, has_tower=tower, budget_s=budget_s, progress=progress
    )
    line("model", opened.title)
    line("gpu", result.gpu)
    if device == interpreter.DEVICE:
        line("note", "no time of the interpreter means anything")
    for text in result.lines():
        line("linear", text)
    for text in result.tower_lines():
        line("tower", text)
    if json_out is not None:
        write_json(result.as_json(), json_out)
        line("written", str(json_out))
    if result.stored is not None:
        line("written", str(result.stored))
