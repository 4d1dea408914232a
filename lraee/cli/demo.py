"""The command `lraee demo`: answers on sample photos."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli import tables
from lraee.cli.common import Model, Pretrained, Show, command, console, line, require_writable


@command
def demo(
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or ZIP of photos; else scikit-image's photos."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many of your photos.")] = 64,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("results/demo.json"),
    progress: Show = True,
) -> None:
    """Run a real CLIP on real photos: float, int8 and early exits, with zero-shot answers.

    The exits are learned on the spot from crops of the photos.

    Example: `lraee demo --data ~/photos`, or `lraee demo --model ViT-B-32 --pretrained openai`
    """
    from lraee.evaluation import demo
    from lraee.storage.json import write_json
    from lraee.zoo.opening import open_model

    require_writable(out)
    photos = demo.open_photos(data, limit)
    result = demo.run(open_model(model, pretrained), photos, progress=progress)
    write_json(result, out)
    line("model", f"{result['model']}, {result['classes']} class names")
    line("machine", f"{result['machine']}, {result['threads']} threads, {result['operators']}")
    line("photos", f"{result['photos']}; {photos.report()}")
    plan = result["plan"]
    line(
        "exits", f"after blocks {plan['exits']}, learned from {result['crops']} crops of the photos"
    )
    console.print(tables.of_answers(result["answers"]))
    console.print(tables.of_forms(result["rows"]))
    line("written", str(out))
    line("next", "lraee embed PHOTOS --out DIR embeds a library of any size")
