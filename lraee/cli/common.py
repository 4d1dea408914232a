"""What the commands share: the app, options, one-line errors, lines of output."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EISDIR
from functools import wraps
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

P = ParamSpec("P")
Show = Annotated[bool, typer.Option(help="Show progress bars.")]
Model = Annotated[str, typer.Option(help="A model of the zoo, or of open_clip.")]
Pretrained = Annotated[
    str | None, typer.Option(help="Tag or weights file of an open_clip model; the zoo needs none.")
]
Data = Annotated[Path, typer.Option(exists=True, help="Folder or ZIP, one folder per class.")]
ClassFile = Annotated[
    Path | None,
    typer.Option(exists=True, help='JSON with "wnids" (folder names) and "names" (words).'),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many photos, evenly spread.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="From `lraee quantize` or lraee.save; has its scheme."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

app = typer.Typer(
    help="CLIP image encoders in INT8.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_OWN_ERRORS = ("LRAEE_", "calibrate: ", "accelerate: ", "retrieval: ", "serve: ")
"""How the messages of checked arguments begin; another ValueError is a bug and keeps its trace."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1; bugs keep their traceback."""
    from lraee.data.sources import DataError
    from lraee.storage.files import CheckpointError
    from lraee.zoo.opening import ModelError

    try:
        yield
    except (
        CheckpointError, DataError, ImportError, ModelError, NotImplementedError, OSError,
    ) as error:  # fmt: skip
        text = (str(error).splitlines() or [type(error).__name__])[0]
        errors.print(f"lraee: error: {text}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        if not str(error).startswith(_OWN_ERRORS):
            raise
        errors.print(f"lraee: error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Registers a command of the app, its errors in one line."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        with _one_line_errors():
            from lraee.measurement.machine import limit_threads

            limit_threads()
            function(*args, **kwargs)

    return app.command(epilog=None)(guarded)


def require_writable(path: Path, *, is_folder: bool = False) -> None:
    """Raises OSError, before work starts, where a result could not be written at its end.

    Args:
      path: of a file, or of a folder with `is_folder`; what is missing of it is made now.
    """
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_folder and path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(
            f"output must be writable, got {path}: {reason}; name another place"
        ) from error


def printable(text: str) -> str:
    """The text, with escapes for what the terminal's encoding lacks and for control characters."""
    encoding = console.encoding or "utf-8"
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def line(key: str, text: str) -> None:
    """One aligned line: a name and what it is."""
    console.print(printable(f"{key:<16}{text}"), markup=False, soft_wrap=True)
