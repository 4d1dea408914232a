"""Small JPEGs of the photos, made when first needed and kept beside the embeddings."""

import hashlib
import logging
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from lraee.data.decoding import decode
from lraee.serving.search.library import Library
from lraee.storage.files import replace_file

_BOX = (640, 400)
_QUALITY = 80
_log = logging.getLogger("lraee.serving")


class Thumbnails:
    """jpeg(row): at most 640 x 400 pixels.

    Args:
      library: whose photos.
      folder: where they are kept; made when needed. Where it cannot be written, nothing is kept.
    """

    def __init__(self, library: Library, folder: Path) -> None:
        """See the class."""
        self._library, self._folder = library, folder
        self._can_write = True

    def jpeg(self, row: int) -> bytes:
        """One thumbnail; blocks. Raises: DataError where the photo cannot be read."""
        path = self._path(row)
        with suppress(OSError):
            if is_whole(data := path.read_bytes()):
                return data
        data = _shrink(self._library.read(row))
        if self._can_write:
            self._keep(path, data)
        return data

    def _path(self, row: int) -> Path:
        embeddings = self._library.embeddings
        name = embeddings.names[row].encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(name + embeddings.rows[row].tobytes()).hexdigest()[:32]
        return self._folder / digest[:2] / f"{digest}.jpg"

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        except OSError as error:
            self._can_write = False
            _log.warning("thumbnails are not kept: %s", os.strerror(error.errno or 0))


def is_whole(data: bytes) -> bool:
    """Whether a kept thumbnail has the two ends of a JPEG; else it is made again."""
    return data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")


def _shrink(data: bytes) -> bytes:
    pixels = decode(data, target=max(_BOX), mode="fast").pixels
    image = Image.fromarray(pixels)
    image.thumbnail(_BOX, Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()
