"""The ASGI edge: bounded bodies, clients that leave, one-line errors, the token."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lraee.serving.errors import ServiceError, bad_request
from lraee.serving.service import Service

_log = logging.getLogger("lraee.serving")
_OPEN_PATHS = ("/health/", "/v2/health/", "/page/")
_OPEN_EXACT = ("/", "/ping", "/login")
NO_SNIFF = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class ClientLeft(Exception):
    """The client closed its connection before the answer."""


@dataclass(frozen=True)
class Call:
    """One request whose body is here, and the service that answers it."""

    service: Service
    request: Request
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; raises 400."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise bad_request("the body must be JSON") from None
        if not isinstance(value, dict):
            raise bad_request("the body must be a JSON object")
        return value

    @property
    def is_multipart(self) -> bool:
        """Whether the body is a form with files."""
        return self.request.headers.get("content-type", "").startswith("multipart/form-data")

    async def form(self) -> FormData:
        """The fields and files of a multipart body; raises 400."""

        async def stream() -> AsyncGenerator[bytes, None]:
            yield self.body

        items = self.service.settings.items
        parser = MultiPartParser(
            self.request.headers, stream(), max_files=items, max_fields=items,
            max_part_size=1 << 20,
        )  # fmt: skip
        parser.spool_max_size = len(self.body) + 1  # nothing goes to the disk
        try:
            return await parser.parse()
        except (MultiPartException, KeyError, ValueError, LookupError, AttributeError):
            raise bad_request("the multipart body cannot be read") from None


Handler = Callable[[Call], Awaitable[Response]]


def answer(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON; numpy rows become lists."""
    data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(
        data, status, headers={**NO_SNIFF, **(headers or {})}, media_type="application/json"
    )


def error_answer(error: ServiceError) -> Response:
    """The error in OpenAI's shape."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return answer({"error": error.as_json()}, error.status, headers)


def fields(form: FormData, name: str) -> list[str]:
    """All text fields of one name."""
    return [value for value in form.getlist(name) if isinstance(value, str)]


async def files(form: FormData, name: str) -> list[bytes]:
    """All files of one name."""
    return [await v.read() for v in form.getlist(name) if isinstance(v, UploadFile)]


def route(
    service: Service, path: str, handler: Handler, methods: Iterable[str] = ("GET",)
) -> Route:
    """A route whose handler is cancelled when its client leaves, and whose errors are one line."""

    async def endpoint(request: Request) -> Response:
        started, status = time.perf_counter(), 499
        try:
            response = await _guarded(service, request, handler)
            status = response.status_code
            return response
        finally:
            service.metrics.requests.labels(path, str(status)).inc()
            service.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)

    return Route(path, endpoint, methods=list(methods))


async def _guarded(service: Service, request: Request, handler: Handler) -> Response:
    try:
        if request.method in ("GET", "HEAD"):
            return await handler(Call(service, request, b""))
        with service.admission.body(_expected_bytes(service, request.headers)):
            body = await _read_body(service, request)
            return await _until_left(request, handler(Call(service, request, body)))
    except ServiceError as error:
        return error_answer(error)
    except ClientLeft:
        return Response(status_code=499)  # it cannot be read any more
    except Exception:
        _log.exception("%s %s failed", request.method, request.url.path)
        return error_answer(ServiceError(500, "internal error", "internal"))


def _expected_bytes(service: Service, headers: Headers) -> int:
    """Memory that the body may take; raises 413 before a byte of it is read."""
    limit, length = service.settings.body_bytes, headers.get("content-length")
    if length is None:
        return limit
    if not length.isdecimal() or len(length) > 18 or int(length) > limit:
        raise _too_large(limit)
    return int(length)


def _too_large(limit: int) -> ServiceError:
    return ServiceError(413, f"a request must have at most {limit} bytes", "too_large")


async def _read_body(service: Service, request: Request) -> bytes:
    limit, chunks, size = service.settings.body_bytes, [], 0
    try:
        async with asyncio.timeout(service.settings.body_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ServiceError(408, "the body did not come in time", "timeout") from None


async def _until_left(request: Request, work: Awaitable[Response]) -> Response:
    """The work's response; the work is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def is_same(given: str, expected: str) -> bool:
    """Whether two secrets are equal, in time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


class AccessControl:
    """Middleware: the Host header, then the token, before anything else is read.

    Health, ping and the page itself are open; all that reads a model or a photo is not. A browser
    that logged in bears a cookie, which opens GET routes alone.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """See the class."""
        self._app, self._settings = app, service.settings
        self._hosts = frozenset(host.lower() for host in service.settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            headers, refusal = Headers(scope=scope), None
            if self._hosts and _host(headers) not in self._hosts:
                refusal = ServiceError(421, "this server does not answer to that Host", "bad_host")
            elif not self._is_open(scope["path"]) and not self._has_token(scope, headers):
                refusal = ServiceError(401, "a valid bearer token is needed", "invalid_token")
            if refusal is not None:
                await error_answer(refusal)(scope, receive, send)
                return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in _OPEN_EXACT or path.startswith(_OPEN_PATHS)

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        token = self._settings.token
        if token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return is_same(given.strip(), token)
        cookie = Request(scope).cookies.get("lraee", "")
        return scope["method"] in ("GET", "HEAD") and is_same(cookie, page_cookie(token))


def page_cookie(token: str) -> str:
    """What a browser bears instead of the token; the token cannot be had from it."""
    return hmac.new(token.encode(), b"lraee page", "sha256").hexdigest()


def _host(headers: Headers) -> str:
    """The Host header without its port, in lower case."""
    host = headers.get("host", "").lower()
    return host.rsplit(":", 1)[0] if not host.endswith("]") else host


def json_field(text: str, name: str) -> Any:
    """A form field that holds JSON; raises 400."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request(f'"{name}" must be JSON') from None
