"""Opens a page in a headless browser without network, on phone and desktop, light and dark.

    python -m bench.check_page report.html --out SCREENSHOTS

Fails if the page logs an error, asks for anything but itself, is wider than the window, shows a
picture without size or label, or text that is too pale (contrast below 4.5). Needs Debian's
`chromium` and `pip install playwright`; writes one screenshot per width and scheme.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

WIDTHS = {"phone": 390, "desktop": 1280}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

_WIDTH = "() => [document.documentElement.scrollWidth, window.innerWidth]"
_UNLABELLED = """() => [...document.querySelectorAll('img, svg')].filter(each => {
  const box = each.getBoundingClientRect();
  const name = each.getAttribute('alt') || each.getAttribute('aria-label')
    || document.getElementById(each.getAttribute('aria-labelledby'))?.textContent;
  return !name || box.width < 1 || box.height < 1;
}).map(each => each.outerHTML.slice(0, 80))"""
_DUPLICATES = """() => { const seen = [...document.querySelectorAll('[id]')]
  .filter(each => !each.closest('defs')).map(each => each.id);
  return seen.filter((id, place) => seen.indexOf(id) !== place); }"""
_PALE = """() => {
  const channels = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = each => {
    for (; each; each = each.parentElement) {
      const colour = channels(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const hasText = each => [...each.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll('body *')].filter(hasText).map(each => {
    const style = getComputedStyle(each);
    const ink = each.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(channels(ink)), light(behind(each))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), each.textContent.trim().slice(0, 40)];
  }).filter(([contrast]) => contrast < 4.5);
}"""


def browser_program() -> str | None:
    """Path of an installed Chromium, if there is one."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def check(page: Path, out: Path) -> list[str]:
    """What is wrong with the page; empty if nothing is. Writes screenshots into `out`.

    Raises: ImportError without playwright, FileNotFoundError without a browser.
    """
    from playwright.sync_api import sync_playwright

    program = browser_program()
    if program is None:
        raise FileNotFoundError(f"check_page: one of {_BROWSERS} must be installed, got none")
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    with sync_playwright() as playwright:
        # In a container: shared memory is too small for tall pages, and root gets no sandbox.
        arguments = ["--disable-dev-shm-usage", "--disable-gpu"]
        arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        for device, width in WIDTHS.items():
            for scheme in SCHEMES:
                name = f"{device}-{scheme}"
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
                )
                shot = out / f"{name}.png"
                faults += [f"{name}: {fault}" for fault in _faults(context, page, shot)]
                context.close()
        browser.close()
    return faults


def _faults(context: Any, page: Path, shot: Path) -> Iterator[str]:
    """Opens the page once; folded parts are looked at too."""
    tab, address = context.new_page(), page.resolve().as_uri()
    said: list[str] = []
    requested: list[str] = []
    tab.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(address)
    tab.screenshot(path=shot, full_page=True)
    tab.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    yield from (f"the console says: {text}" for text in said)
    outside = {url for url in requested if url != address and not url.startswith("data:")}
    yield from (f"asks for {url}" for url in sorted(outside))
    width, window = tab.evaluate(_WIDTH)
    if width > window:
        yield f"is {width} px wide in a window of {window}"
    yield from (f"has no label or size: {each}" for each in tab.evaluate(_UNLABELLED))
    yield from (f"has the id {each} twice" for each in tab.evaluate(_DUPLICATES))
    yield from (f"has contrast {ratio:.2f}: {text}" for ratio, text in tab.evaluate(_PALE))


def main(
    page: Path,
    out: Annotated[Path, typer.Option(help="Folder for screenshots.")] = Path("results/page"),
) -> None:
    """Check the page; one line per fault, exit code 1 if there is one."""
    faults = check(page, out)
    for fault in faults:
        typer.echo(f"{page}: {fault}", err=True)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{page}: no fault; screenshots in {out}")


if __name__ == "__main__":
    typer.run(main)
