"""The command `lraee quantize`: an int8 checkpoint, calibrated on photos."""

from pathlib import Path
from typing import Annotated

import typer

from lraee.cli.common import Data, Model, Pretrained, Show, command, line, require_writable


@command
def quantize(
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint; a run cut off goes on there.")
    ],
    model: Model = "lraee-tiny",
    pretrained: Pretrained = None,
    limit: Annotated[
        int, typer.Option(min=64, max=256, help="So many photos, evenly spread.")
    ] = 128,
    memory_mb: Annotated[
        int, typer.Option(min=1, help="Most memory beside the model and the photos.")
    ] = 4096,
    progress: Show = True,
) -> None:
    """Calibrate an int8 model on photos, and save it: the scheme int8-calibrated.

    Labels are not needed. `--checkpoint` of embed, serve, evaluate and calibrate takes the folder.

    Example: `lraee quantize --data photos --out checkpoint`
    """
    from lraee.data.batches import PhotoImages
    from lraee.data.photos import Photos
    from lraee.model.accelerate import accelerate
    from lraee.model.checkpoint import save
    from lraee.quantization.images import Calibration
    from lraee.zoo.opening import open_model

    require_writable(out, is_folder=True)
    photos = Photos(data, limit=limit)
    opened = open_model(model, pretrained)
    images = PhotoImages(photos, opened.preprocess, progress=progress)
    given = Calibration(images, memory_mb=memory_mb, folder=out / "unfinished", progress=progress)
    fast = accelerate(opened.model, calibration=given)
    save(fast, out)
    line("model", f"{opened.title}, int8-calibrated")
    line("photos", f"{len(images.names)}; {photos.report()}")
    line("written", str(out))
