"""The models of one server, whatever the protocol."""

import asyncio
import base64
import binascii
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from lraee.measurement.machine import limit_threads
from lraee.serving.admission import Admission
from lraee.serving.batching import Batcher, Kind, Result
from lraee.serving.encoder import ClipEncoder
from lraee.serving.errors import ServiceError, bad_request
from lraee.serving.fetch import Fetcher
from lraee.serving.images import Decoder, Picture, too_large
from lraee.serving.metrics import Metrics
from lraee.serving.settings import Settings

_CACHED_CLASSES = 16_384
_READY_BATCHES = 4
# Below this a thread's wake-up costs more than the decoding: 0.1 ms for 128 KiB.
_SMALL_BASE64 = 256 << 10


class ServedModel:
    """One model with its batcher; tensors that wait are at most four batches."""

    def __init__(self, encoder: ClipEncoder, settings: Settings, metrics: Metrics) -> None:
        """See the class."""
        self.encoder, self.name = encoder, encoder.name
        self.batcher = Batcher(encoder.name, encoder, settings, metrics)
        self.preprocess = encoder.preprocess.with_options(limits=settings.decoding)
        self.slots = asyncio.Semaphore(_READY_BATCHES * settings.max_batch)
        self.classes: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        metrics.watch_depth(encoder.name, lambda: self.batcher.depth)


class Service:
    """embed images and texts with one of several models.

    Args:
      encoders: at least one, with different names.
      settings: limits.
    Raises: ValueError on two models of one name.
    """

    def __init__(self, encoders: Sequence[ClipEncoder], settings: Settings) -> None:
        """See the class."""
        self.settings, self.metrics = settings, Metrics()
        self.models = {e.name: ServedModel(e, settings, self.metrics) for e in encoders}
        if len(self.models) < max(1, len(encoders)):
            names = ", ".join(encoder.name for encoder in encoders)
            raise ValueError(f"serve: models must have different names, got {names or 'none'}")
        self.admission = Admission(settings)
        self.decoder = Decoder(settings, self.metrics)
        self.fetcher = Fetcher(settings.url_hosts, settings.image_bytes)
        self._fetching = ThreadPoolExecutor(4, thread_name_prefix="lraee-fetch")
        self.is_closing = False

    def start(self) -> None:
        """Start every worker; the model's threads are bounded by the CPU quota."""
        limit_threads()
        for model in self.models.values():
            model.batcher.start()

    async def warm_up(self) -> None:
        """Run each model once, so that its first client does not pay for it and 429 knows its time.

        Raises: ServiceError where a model does not run.
        """
        for model in self.models.values():
            blank = torch.zeros(3, *model.encoder.image_size)
            for _ in range(2):
                model.batcher.forget_seconds()
                await model.batcher.submit("image", blank)
                await model.batcher.submit("text", "a photo")

    async def close(self) -> None:
        """Finish what was accepted, then end all threads."""
        self.is_closing = True
        for model in self.models.values():
            await asyncio.to_thread(model.batcher.close)
        self.decoder.close()
        self._fetching.shutdown(wait=False, cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Whether every model's worker runs."""
        return not self.is_closing and all(m.batcher.is_alive for m in self.models.values())

    def model(self, name: object) -> ServedModel:
        """The model of this name; raises 404 for another, 400 for none."""
        if not isinstance(name, str) or not name:
            raise bad_request('"model" must be a name')
        if name not in self.models:
            known = ", ".join(self.models)
            raise ServiceError(404, f"this server has {known}, no such model", "model_not_found")
        return self.models[name]

    def cost_s(
        self, model: ServedModel, *, images: int = 0, texts: int = 0, classes: int = 0
    ) -> float:
        """Time that these inputs will take."""
        seconds = model.batcher.seconds
        # Decoding runs beside the model: the slower of both sets the pace.
        image_s = max(seconds("image"), self.decoder.seconds / self.decoder.threads)
        class_s = seconds("class") or 8 * seconds("text")
        return images * image_s + texts * seconds("text") + classes * class_s

    async def embed_image(self, model: ServedModel, data: bytes) -> tuple[Result, Picture]:
        """Decode one image and embed it. Raises ServiceError 413, 415, 422, 500, 503, 504."""
        batcher = model.batcher
        batcher.arrive()
        is_arriving = True
        try:
            async with asyncio.timeout(self.settings.deadline_s), model.slots:
                picture = await self.decoder.decode(data, model.preprocess)
                future = batcher.submit("image", picture.tensor)
                is_arriving = False
                batcher.depart()
                return await future, picture
        except TimeoutError:
            raise ServiceError(504, "the deadline passed", "deadline") from None
        finally:
            if is_arriving:
                batcher.depart()

    async def embed(self, model: ServedModel, kind: Kind, text: str) -> Result:
        """Embed one text or one class name."""
        if not text.strip():
            raise bad_request("a text must not be empty")
        if len(text) > self.settings.text_chars:
            raise ServiceError(
                413, f"a text must have at most {self.settings.text_chars} characters", "too_large"
            )
        return await model.batcher.submit(kind, text)

    async def class_rows(self, model: ServedModel, names: Sequence[str]) -> NDArray[np.float32]:
        """Unit rows [K, E] of class names; those of the last 16,384 names are kept."""
        cache = model.classes
        missing = [name for name in dict.fromkeys(names) if name not in cache]
        rows = await asyncio.gather(*(self.embed(model, "class", name) for name in missing))
        fresh = {name: row.embedding for name, row in zip(missing, rows, strict=True)}
        stacked = np.stack([fresh[name] if name in fresh else cache[name] for name in names])
        for name in names:
            cache[name] = fresh[name] if name in fresh else cache[name]
            cache.move_to_end(name)
        while len(cache) > _CACHED_CLASSES:
            cache.popitem(last=False)
        return stacked

    async def image_bytes(self, source: str) -> bytes:
        """Bytes of an image given as data URI, plain base64, or URL. Raises ServiceError."""
        if source[:8].lower().startswith(("http://", "https://")):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._fetching, self.fetcher.fetch, source)
        header, comma, payload = source.partition(",")
        if comma:
            if not header.lower().startswith("data:") or not header.lower().endswith(";base64"):
                raise bad_request("an image must be a data URI: data:image/jpeg;base64,…")
        else:
            payload = source
        if len(payload) * 3 // 4 > self.settings.image_bytes + 3:
            raise too_large(self.settings)
        try:
            if len(payload) < _SMALL_BASE64:
                return base64.b64decode(payload, validate=True)
            return await self.decoder.run(lambda: base64.b64decode(payload, validate=True))
        except (binascii.Error, ValueError):
            raise bad_request("an image must be valid base64") from None
