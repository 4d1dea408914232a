"""Bytes of one image to the tensor that a model takes, in a small pool of threads."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lraee.data.decoding import DecodeError
from lraee.data.headers import Format, format_of
from lraee.data.preprocess import Preprocess
from lraee.measurement.machine import threads_here
from lraee.serving.errors import ServiceError
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings

T = TypeVar("T")

MEDIA_TYPES: dict[Format, str] = {
    "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif",
    "BMP": "image/bmp", "TIFF": "image/tiff", "PPM": "image/x-portable-anymap",
    "AVIF": "image/avif", "HEIF": "image/heif",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """What the model takes, float32 [3, H, W], and the size of the upright image it came from."""

    tensor: Tensor
    width: int
    height: int


class Decoder:
    """decode(data, preprocess) off the event loop; its threads come from the CPU quota.

    Args:
      settings: image_bytes.
      metrics: decode_seconds.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """See the class."""
        self._settings, self._metrics = settings, metrics
        self.threads = threads_here()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="lraee-decode")
        self.seconds = 0.0

    async def decode(self, data: bytes, preprocess: Preprocess) -> Picture:
        """Raises ServiceError: 413 too large, 415 no image type, 422 broken or too many pixels."""
        if len(data) > self._settings.image_bytes:
            raise too_large(self._settings)
        if format_of(data) is None:
            known = ", ".join(MEDIA_TYPES)
            raise ServiceError(415, f"an image must be one of {known}", "no_image")
        picture, elapsed_s = await self.run(lambda: _decode(data, preprocess))
        self._metrics.decode_seconds.observe(elapsed_s)
        self.seconds = 0.9 * (self.seconds or elapsed_s) + 0.1 * elapsed_s
        return picture

    async def run(self, function: Callable[[], T]) -> T:
        """function() in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def too_large(settings: Settings) -> ServiceError:
    """413 of an image."""
    return ServiceError(
        413, f"an image must have at most {settings.image_bytes} bytes", "too_large"
    )


def _decode(data: bytes, preprocess: Preprocess) -> tuple[Picture, float]:
    started = time.perf_counter()
    try:
        tensor, (height, width) = preprocess.with_size(data)
    except DecodeError as error:
        raise ServiceError(422, f"the image {error}", "broken_image") from None
    return Picture(tensor, width, height), time.perf_counter() - started
