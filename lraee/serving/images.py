"""Bytes of one image to the tensor that a model takes, in a small pool of threads."""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lraee.data.photos import decode
from lraee.data.sources import DataError
from lraee.measurement.machine import available_cpus
from lraee.serving.errors import ServiceError
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings
from lraee.zoo.opening import Opened

T = TypeVar("T")

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (8, b"WEBP", "image/webp"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (0, b"P6", "image/x-portable-pixmap"),
    (0, b"P5", "image/x-portable-graymap"),
)


def media_type(data: bytes) -> str | None:
    """The type of an image by its first bytes; None for all that is not decoded here."""
    for offset, signature, name in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return name
    return None


@dataclass(frozen=True)
class Picture:
    """What the model takes, float32 [3, H, W], and the size of the image it came from."""

    tensor: Tensor
    width: int
    height: int


class Decoder:
    """decode(data, opened) off the event loop; its threads come from the CPU quota.

    Args:
      settings: image_bytes and the limits on pixels.
      metrics: decode_seconds.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """See the class."""
        self._settings, self._metrics = settings, metrics
        threads = max(1, math.floor(available_cpus()))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lraee-decode")
        self.seconds = 0.0

    async def decode(self, data: bytes, opened: Opened) -> Picture:
        """Raises ServiceError: 413 too large, 415 no image type, 422 broken or too many pixels."""
        if len(data) > self._settings.image_bytes:
            raise ServiceError(
                413, f"an image must have at most {self._settings.image_bytes} bytes", "too_large"
            )
        if media_type(data) is None:
            raise ServiceError(
                415, "an image must be JPEG, PNG, WebP, GIF, BMP or TIFF", "no_image"
            )
        picture, elapsed_s = await self.run(lambda: self._decode(data, opened))
        self._metrics.decode_seconds.observe(elapsed_s)
        self.seconds = 0.9 * (self.seconds or elapsed_s) + 0.1 * elapsed_s
        return picture

    async def run(self, function: Callable[[], T]) -> T:
        """function() in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, data: bytes, opened: Opened) -> tuple[Picture, float]:
        started = time.perf_counter()
        try:
            image = decode(data, self._settings.pixels)
            picture = Picture(opened.preprocess(image), image.width, image.height)
        except DataError as error:
            raise ServiceError(422, f"the image {error}", "broken_image") from None
        return picture, time.perf_counter() - started
