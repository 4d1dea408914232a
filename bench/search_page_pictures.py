"""Pictures of the search page for the docs: scikit-image's photos, searched with lraee-tiny.

    python -m bench.search_page_pictures --out docs/images

Embeds the photos, starts `lraee serve` on loopback, and photographs the page in Debian's chromium:
wide, phone, dark, one photo, empty, error. Needs chromium and the extras demo, embed, serve and
browser.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from bench.check_page import browser_program
from lraee.evaluation.demo import SAMPLES

MOST_BYTES = 150_000


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/images"),
) -> None:
    """Write search-NAME.png for each state of the page."""
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        photos = _embed(Path(folder))
        with _server(photos) as url:
            arguments = ["--disable-dev-shm-usage", "--disable-gpu"]
            arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=browser_program(), args=arguments)
            for name, shot in _pictures(browser, url):
                path = out / f"search-{name}.png"
                path.write_bytes(_small(shot))
                typer.echo(f"{path}: {path.stat().st_size} bytes")
            browser.close()


def _embed(folder: Path) -> Path:
    """The photos' embeddings, from a list of paths."""
    import skimage

    root = Path(skimage.__file__).parent / "data"
    paths, out = folder / "photos.txt", folder / "photos.parquet"
    paths.write_text("\n".join(str(root / name) for name in SAMPLES))
    command = [sys.executable, "-m", "lraee", "embed", str(paths), "--out", str(out)]
    subprocess.run(command, check=True)
    return out


@contextmanager
def _server(photos: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "lraee", "serve", "--photos", str(photos), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = next(row for row in process.stdout if row.startswith("ready"))
        yield ready.split()[1].rstrip(",")
        process.terminate()


def _pictures(browser: Any, url: str) -> Iterator[tuple[str, bytes]]:
    wide, phone = {"width": 800, "height": 520}, {"width": 360, "height": 640}
    yield "wide", _shot(browser, f"{url}/?q=an+espresso", viewport=wide)
    yield "phone", _shot(browser, f"{url}/?q=missile", viewport=phone, has_touch=True)
    yield "dark", _shot(browser, f"{url}/?like=3", viewport=wide, color_scheme="dark")
    nothing = {"results": [], "text_ms": 0, "search_ms": 0}
    yield "empty", _shot(browser, url, answer=(200, nothing), viewport=wide)
    busy = {"error": {"message": "12.4 s of work wait already"}}
    yield "error", _shot(browser, f"{url}/?q=a+cat", answer=(429, busy), viewport=wide)


def _shot(
    browser: Any, url: str, *, answer: tuple[int, Any] | None = None, **options: Any
) -> bytes:
    """The page once it is still; `answer` stands for the server's to a search."""
    context = browser.new_context(**options)
    tab = context.new_page()
    if answer is not None:
        status, body = answer
        tab.route(re.compile("/search"), lambda r: r.fulfill(status=status, body=json.dumps(body)))
    tab.goto(url, wait_until="networkidle")
    tab.wait_for_timeout(600)
    shot: bytes = tab.screenshot()
    context.close()
    return shot


def _small(shot: bytes) -> bytes:
    """The picture in as many colours as fit into MOST_BYTES."""
    image = Image.open(BytesIO(shot)).convert("RGB")
    for colors in (256, 192, 128, 96, 64):
        buffer = BytesIO()
        image.quantize(colors, kmeans=3, dither=Image.Dither.NONE).save(
            buffer, "PNG", optimize=True
        )
        if buffer.tell() < MOST_BYTES:
            break
    return buffer.getvalue()


if __name__ == "__main__":
    typer.run(main)
