"""The command `lraee serve`: embeddings over HTTP, and a page to search photos."""

import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lraee.cli.common import Checkpoint, command, line

if TYPE_CHECKING:
    from starlette.applications import Starlette


@command
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Of the zoo or open_clip, NAME or NAME__TAG; again for more models."),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file, where one model is served.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="int8, int8-patches, paper, or float: not accelerated. "
            "[default: that of --exits, else int8]"
        ),
    ] = None,
    exits: Annotated[
        Path | None, typer.Option(exists=True, help="From `lraee calibrate`, for one model.")
    ] = None,
    checkpoint: Checkpoint = None,
    text: Annotated[
        str | None, typer.Option(help="int8: the text tower is quantized too. [default: float]")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact/--fast", help="The pixels of the model's transform, or faster.")
    ] = False,
    photos: Annotated[
        Path | None,
        typer.Option(exists=True, help="From `lraee embed`: adds the page that searches them."),
    ] = None,
    photos_from: Annotated[
        Path | None, typer.Option(exists=True, help="Folder or ZIP, where the photos moved.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 3003,
    token_file: Annotated[
        Path | None,
        typer.Option(exists=True, help="Clients must bear this token; or set LRAEE_TOKEN."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host header to answer to, beside localhost; again for more."),
    ] = None,
    allow_url_host: Annotated[
        list[str] | None, typer.Option(help="Host that images may be fetched from by URL.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images per call of the model.")] = 32,
    max_image_mb: Annotated[float, typer.Option(min=0.01, help="Largest image.")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Most pixels.")] = 64.0,
    queue_s: Annotated[float, typer.Option(min=0.01, help="Work that may wait, else 429.")] = 10.0,
    deadline_s: Annotated[float, typer.Option(min=0.01, help="Longest wait, else 504.")] = 30.0,
) -> None:
    """Serve embeddings over HTTP: OpenAI's API, immich's, and a page to search photos.

    Example: `lraee serve --photos embeddings.parquet`, or
    `lraee serve --model ViT-B-32__openai --host 0.0.0.0 --token-file token`
    """
    names = model or ["lraee-tiny"]
    if len(names) > 1 and (pretrained or exits or checkpoint):
        raise typer.BadParameter(
            "--pretrained, --exits and --checkpoint need one --model; write NAME__TAG"
        )
    if text not in (None, "int8"):
        raise typer.BadParameter(f"--text must be int8, or left out, got {text!r}")
    _require_extra()
    from lraee.data.decoding import Limits, Mode
    from lraee.serving.encoder import ModelChoice
    from lraee.serving.search.library import Library, read_embeddings
    from lraee.serving.server import create_app
    from lraee.serving.settings import Settings

    image_bytes = round(max_image_mb * (1 << 20))
    _check_scheme(scheme, checkpoint)
    with _bind(host, port) as listener:
        settings = Settings(
            body_bytes=max(2 * image_bytes, 1 << 20), image_bytes=image_bytes, max_batch=max_batch,
            queue_s=queue_s, deadline_s=deadline_s,
            decoding=Limits(max_bytes=image_bytes, max_pixels=round(max_megapixels * 1e6)),
            url_hosts=tuple(allow_url_host or ()), token=_token(token_file),
            allowed_hosts=_allowed_hosts(host, allow_host or []),
        )  # fmt: skip
        library = None
        if photos is not None:
            library = Library(read_embeddings(photos), photos_from)
            library.require_photos()
        mode: Mode = "exact" if exact else "fast"
        choices = [
            ModelChoice(each, pretrained, scheme, exits, text, mode, checkpoint) for each in names
        ]
        encoders = [choice.open() for choice in choices]
        kept = Path("thumbnails") if photos is None else photos.with_suffix(".thumbnails")
        app = create_app(encoders, settings, library, thumbnails=kept)
        for encoder in encoders:
            line("model", f"{encoder.name}: {encoder.width} numbers")
        if library is not None:
            line("photos", f"{len(library)}, {library.index.name} search")
        if settings.token is None and not _is_loopback(host):
            line("note", f"{host} is open to its network: no token is set")
        _run(app, listener, has_page=library is not None)


def _require_extra() -> None:
    try:
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import pybase64  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"serve: {error.name} is not installed: pip install 'lraee[serve]'"
        ) from error


def _check_scheme(name: str | None, checkpoint: Path | None) -> None:
    from lraee.layers.scheme import find_scheme
    from lraee.model.opened import require_one

    try:
        if name not in (None, "float"):
            find_scheme(str(name))
        require_one(name, checkpoint)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _token(path: Path | None) -> str | None:
    from lraee.serving.settings import read_token

    try:
        return read_token(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _allowed_hosts(host: str, more: list[str]) -> tuple[str, ...]:
    """Host headers: on loopback its names, so that no web page reaches it by a name of its own."""
    from lraee.serving.settings import LOOPBACK_NAMES

    return (*LOOPBACK_NAMES, host, *more) if _is_loopback(host) else tuple(more)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    """A socket of this address, before a model is loaded in vain; raises OSError in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only where the protocol is named does asyncio turn Nagle's algorithm off: with it the body of
    # an answer waits 40 ms for the client to acknowledge the head
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(
            f"serve: --host and --port must be free to listen on, got {host}:{port}: {reason}"
        ) from error
    return listener


def _run(app: "Starlette", listener: socket.socket, *, has_page: bool) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens, in one line on stdout, once it does."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and not self.should_exit:
                bound = self.servers[0].sockets[0].getsockname()
                name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
                page = ", the page is at /" if has_page else ""
                line("ready", f"http://{name}:{bound[1]}{page}")
                sys.stdout.flush()

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else each bad form is a line
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        date_header=False, limit_concurrency=1024, timeout_keep_alive=30, lifespan="on",
        timeout_graceful_shutdown=60, ws="none",
    )  # fmt: skip
    # uvicorn finishes accepted requests, then raises the signal again: that is a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server = Server(config)
    server.run(sockets=[listener])
    if not server.started:
        raise OSError("serve: the server did not start, as the line above says")
