"""The forms of a model that are measured beside float: schemes, and peers."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.evaluation import peers
from lraee.model.accelerate import accelerate
from lraee.quantization.images import Calibration
from lraee.zoo.opening import Opened

CALIBRATED = "int8-calibrated"
PHOTOS = 128


def require_forms(schemes: Sequence[str], others: Sequence[str], *, has_photos: bool) -> None:
    """Raises ValueError on a peer of no such name, and on a form that lacks calibration photos."""
    for name in others:
        if name not in peers.PEERS:
            raise ValueError(
                f"evaluate: peer must be one of {', '.join(peers.PEERS)}, got {name!r}"
            )
    wanting = [name for name in (*schemes, *others) if name in (CALIBRATED, "openvino")]
    if wanting and not has_photos:
        raise ValueError(
            f"evaluate: --calibration must be given for {wanting[0]}, got none; give a folder or"
            " ZIP of photos that are not in --data"
        )


def photos(path: Path, opened: Opened, progress: bool) -> PhotoImages:
    """Calibration photos of a folder or ZIP, evenly spread."""
    return PhotoImages(Photos(path, limit=PHOTOS), opened.preprocess, progress=progress)


def of_scheme(
    model: nn.Module, name: str, text: str | None, images: PhotoImages | Tensor | None
) -> nn.Module:
    """The model accelerated by the scheme of this name."""
    if name != CALIBRATED:
        return accelerate(model, scheme=name, text=text)
    assert images is not None
    return accelerate(model, text=text, calibration=Calibration(images))


def of_peer(model: nn.Module, name: str, images: PhotoImages | Tensor | None) -> nn.Module:
    """The model as the peer of this name runs it."""
    if name == "bfloat16":
        return peers.in_bfloat16(model)
    assert images is not None
    return peers.openvino_int8(model, images)
