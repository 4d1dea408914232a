"""The page to search photos, and what it asks for. Photos are known by row, never by path."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from lraee.data.headers import format_of
from lraee.data.sources import DataError
from lraee.serving.errors import ServiceError, bad_request
from lraee.serving.http import NO_SNIFF, Call, answer, is_same, page_cookie, route
from lraee.serving.images import MEDIA_TYPES
from lraee.serving.search.index import Hits
from lraee.serving.search.library import Embeddings, Library
from lraee.serving.search.thumbnails import Thumbnails
from lraee.serving.service import ServedModel, Service

_PAGE = Path(__file__).parents[1] / "page"
_ASSETS = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# What a browser shows by itself; other photos are shown as their thumbnails.
_SHOWN = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {**NO_SNIFF, "Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
_PHOTO_HEADERS = {
    **NO_SNIFF,
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=3600",
}
_MOST = 500
# CLIP learned from captions: a word alone finds less than the word in one.
_PROMPT = "a photo of {}"


@dataclass(frozen=True)
class _Search:
    library: Library
    model: ServedModel
    thumbnails: Thumbnails

    async def assets(self, call: Call) -> Response:
        name = call.request.path_params.get("name", "page.html")
        if name != "page.html" and name not in _ASSETS:
            raise ServiceError(404, "no such path", "not_found")
        kind = _ASSETS.get(name, "text/html; charset=utf-8")
        return Response((_PAGE / name).read_bytes(), headers=_PAGE_HEADERS, media_type=kind)

    async def about(self, call: Call) -> Response:
        return answer({"photos": len(self.library), "model": self.model.name})

    async def search(self, call: Call) -> Response:
        """?q=text, ?like=row, or neither: photos spread evenly."""
        started = time.perf_counter()
        k = _number(call, "k", 60, most=_MOST)
        query, like = call.request.query_params.get("q", ""), call.request.query_params.get("like")
        text_ms = 0.0
        if like is not None:
            row = _number(call, "like", None, most=len(self.library) - 1)
            hits, search_ms = await self._timed(call, lambda: self.library.similar(row, k))
        elif query.strip():
            with call.service.admission.work(call.service.cost_s(self.model, texts=1)):
                result = await call.service.embed(self.model, "text", _PROMPT.format(query))
            text_ms = 1e3 * (time.perf_counter() - started)
            vector = result.embedding
            hits, search_ms = await self._timed(call, lambda: self.library.search(vector, k))
        else:
            step = max(1, len(self.library) // k)
            rows = [{**self._row(row), "score": None} for row in range(0, len(self.library), step)]
            return answer({"results": rows[:k], "text_ms": 0.0, "search_ms": 0.0})
        rows = [
            {**self._row(int(row)), "score": round(float(score), 4)}
            for row, score in zip(hits.rows, hits.scores, strict=True)
        ]
        times = {"text_ms": round(text_ms, 2), "search_ms": round(search_ms, 2)}
        liked = {} if like is None else {"like": self._row(int(like))}
        return answer({"results": rows, **times, **liked})

    async def thumbnail(self, call: Call) -> Response:
        data = await self._read(call, self.thumbnails.jpeg)
        return Response(data, headers=_PHOTO_HEADERS, media_type="image/jpeg")

    async def photo(self, call: Call) -> Response:
        data = await self._read(call, self.library.read)
        form = format_of(data)
        if form not in _SHOWN:
            data, form = await self._read(call, self.thumbnails.jpeg), "JPEG"
        return Response(data, headers=_PHOTO_HEADERS, media_type=MEDIA_TYPES[form])

    async def login(self, call: Call) -> Response:
        token, given = call.service.settings.token, call.json().get("token")
        if token is None or not isinstance(given, str) or not is_same(given.strip(), token):
            raise ServiceError(401, "a valid token is needed", "invalid_token")
        response = answer({"status": "welcome"})
        is_tls = call.request.headers.get("x-forwarded-proto", call.request.url.scheme) == "https"
        response.set_cookie(
            "lraee", page_cookie(token), httponly=True, samesite="strict", secure=is_tls,
            max_age=30 * 86400,
        )  # fmt: skip
        return response

    async def _timed(self, call: Call, find: Any) -> tuple[Hits, float]:
        def timed() -> tuple[Hits, float]:
            started = time.perf_counter()
            return find(), 1e3 * (time.perf_counter() - started)

        return await call.service.decoder.run(timed)

    async def _read(self, call: Call, read: Any) -> bytes:
        row = _number(call, "row", None, most=len(self.library) - 1)
        try:
            data: bytes = await call.service.decoder.run(lambda: read(row))
        except DataError:
            raise ServiceError(404, "this photo cannot be read", "photo_missing") from None
        return data

    def _row(self, row: int) -> dict[str, Any]:
        width, height = self.library.embeddings.sizes[row].tolist()
        return {"row": row, "name": self.library.title(row), "width": width, "height": height}


def routes(service: Service, library: Library, thumbnails: Path) -> list[Route]:
    """All routes of this file.

    Args:
      service: has the model that made the library.
      library: photos.
      thumbnails: folder where thumbnails are kept.
    Raises: ValueError where no served model made the library.
    """
    model = _maker(service, library.embeddings)
    search = _Search(library, model, Thumbnails(library, thumbnails))
    return [
        route(service, "/", search.assets),
        route(service, "/page/{name}", search.assets),
        route(service, "/login", search.login, ("POST",)),
        route(service, "/library", search.about),
        route(service, "/search", search.search),
        route(service, "/thumbnails/{row}", search.thumbnail),
        route(service, "/photos/{row}", search.photo),
    ]


def _maker(service: Service, embeddings: Embeddings) -> ServedModel:
    """The served model whose image tower made the rows."""
    width = embeddings.rows.shape[1]
    for model in service.models.values():
        encoder = model.encoder
        is_maker = encoder.opened.title == embeddings.model
        if embeddings.weights and encoder.weights:
            is_maker = encoder.weights == embeddings.weights
        if is_maker and encoder.width == width:
            return model
    served = ", ".join(service.models)
    wanted = f"{embeddings.model or 'the model'} ({width} numbers), which made the embeddings"
    raise ValueError(f"serve: --model must be {wanted}, got {served}")


def _number(call: Call, name: str, default: int | None, *, most: int) -> int:
    """A whole number from the path or the query, 0 to most; raises 400, or 404 for no such row."""
    text = call.request.path_params.get(name) or call.request.query_params.get(name)
    if text is None and default is not None:
        return min(default, most)
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise bad_request(f'"{name}" must be a whole number')
    if int(text) > most:
        if default is not None:
            return most
        raise ServiceError(404, "no such photo", "not_found")
    return int(text)
