"""The application: every protocol over one service."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lraee.serving.encoder import ClipEncoder
from lraee.serving.errors import ServiceError
from lraee.serving.http import AccessControl, error_answer
from lraee.serving.protocols import health, immich, openai, search
from lraee.serving.search.library import Library
from lraee.serving.service import Service
from lraee.serving.settings import Settings


def create_app(
    encoders: Sequence[ClipEncoder],
    settings: Settings | None = None,
    library: Library | None = None,
    *,
    thumbnails: Path = Path("thumbnails"),
) -> Starlette:
    """A Starlette application that serves the models, and the page over `library` if there is one.

    Args:
      encoders: at least one model; the page searches with the one that made the library.
      settings: limits.
      library: photos and their embeddings.
      thumbnails: folder where the page's thumbnails are kept.
    Raises: ValueError on two models of one name, or a library of none of them.
    """
    service = Service(encoders, settings or Settings())
    routes: list[BaseRoute] = [
        *openai.routes(service), *immich.routes(service), *health.routes(service),
    ]  # fmt: skip
    if library is not None:
        routes += search.routes(service, library, thumbnails)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            await service.warm_up()
            yield
        finally:
            await service.close()

    app = Starlette(
        routes=routes,
        middleware=[Middleware(AccessControl, service=service)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    messages = {404: "no such path", 405: "this path does not take that method"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "http_error")
    return error_answer(ServiceError(status, messages.get(status, "bad request"), code))
