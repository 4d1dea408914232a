"""The page in Debian's chromium: searching, keys, widths, states, hostile names."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.check_page import _PALE, _WIDTH, browser_program
from lraee.serving.encoder import ClipEncoder
from lraee.serving.search.library import Library
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from tests.serving.conftest import Running, running
from tests.serving.test_search import HOSTILE, library, page

__all__ = ["library", "page"]

pytestmark = pytest.mark.skipif(
    browser_program() is None, reason="needs chromium (apt-get install chromium), got none"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--disable-dev-shm-usage", "--disable-gpu"]
        arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_program(), args=arguments)
        yield browser
        browser.close()


OpenTab = Callable[..., Any]


@pytest.fixture
def open_tab(chromium: Any, page: Running) -> OpenTab:
    @contextmanager
    def opened(path: str = "/", **options: Any) -> Iterator[Any]:
        """A tab; at its end it must have logged no error and asked for nothing elsewhere."""
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        context = chromium.new_context(**options)
        tab = context.new_page()
        errors: list[str] = []
        urls: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("request", lambda request: urls.append(request.url))
        tab.goto(page.url + path)
        tab.wait_for_selector("#grid li, #notice:not([hidden])")
        yield tab
        context.close()
        # the browser itself logs each status of 400 or more
        assert not [e for e in errors if not e.startswith("Failed to load resource")], errors
        assert all(url.startswith(page.url) for url in urls), urls

    return opened


def names(tab: Any) -> list[str]:
    texts: list[str] = tab.eval_on_selector_all("#grid img", "all => all.map(each => each.alt)")
    return texts


def search(tab: Any, text: str) -> None:
    tab.fill("#query", text)
    with tab.expect_response(re.compile("/search")):
        tab.keyboard.press("Enter")
    tab.wait_for_function("() => document.querySelector('#status').textContent.includes('in all')")


def test_a_known_photo_ranks_first(open_tab: OpenTab) -> None:
    with open_tab() as tab:
        assert len(names(tab)) == 15
        search(tab, "an espresso")
        assert names(tab)[0] == "coffee.png"
        status = tab.text_content("#status")
        assert re.fullmatch(
            r"15 photos · text [\d.]+ ms · search [\d.]+ ms · in all [\d.]+ ms", status
        )
        assert tab.url.endswith("?q=an+espresso") and tab.text_content("h1") == "an espresso"
        tab.wait_for_selector("#grid li:first-child img.loaded")
        tab.go_back()
        tab.wait_for_function("() => document.querySelector('h1').textContent === 'Photos'")


def test_keys_reach_everything(open_tab: OpenTab) -> None:
    with open_tab("/?q=an+espresso") as tab:
        tab.keyboard.press("Escape")  # out of the search field, which has the focus at first
        tab.keyboard.press("/")
        assert tab.evaluate("document.activeElement.id") == "query"
        tab.keyboard.press("ArrowDown")
        focused = "document.activeElement.firstElementChild?.alt"
        first = tab.evaluate(focused)
        assert first == names(tab)[0] == "coffee.png"
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate(focused) == names(tab)[1]
        tab.keyboard.press("ArrowDown")
        assert names(tab).index(tab.evaluate(focused)) > 2
        tab.keyboard.press("Home")
        assert tab.evaluate(focused) == "coffee.png"
        tab.keyboard.press("Enter")
        assert tab.is_visible("#viewer")
        assert tab.text_content("#caption") == "coffee.png · 600 × 400"
        tab.keyboard.press("ArrowRight")
        assert tab.get_attribute("#photo", "alt") == names(tab)[1]
        tab.keyboard.press("ArrowLeft")
        tab.keyboard.press("Escape")
        assert not tab.is_visible("#viewer") and tab.evaluate(focused) == "coffee.png"
        with tab.expect_response(re.compile("/search")):
            tab.keyboard.press("m")
        tab.wait_for_selector("#like:not([hidden])")
        assert tab.text_content("#like-name") == "coffee.png"
        assert "coffee.png" not in names(tab)


def test_more_like_this_by_its_button(open_tab: OpenTab, library: Library) -> None:
    with open_tab() as tab:
        place = library.embeddings.names.index("camera.png")
        tab.hover(f"#grid li:nth-child({place + 1})")
        tab.click(f"#grid li:nth-child({place + 1}) .similar")
        tab.wait_for_selector("#like:not([hidden])")
        tab.wait_for_function("() => document.querySelector('#status').textContent.includes('14')")
        assert names(tab)[0] == HOSTILE
        tab.click("#like-clear")
        tab.wait_for_function("() => document.querySelector('h1').textContent === 'Photos'")


def test_hostile_names_are_text(open_tab: OpenTab, library: Library) -> None:
    with open_tab() as tab:
        assert HOSTILE in names(tab)
        place = library.embeddings.names.index(HOSTILE)
        tab.click(f"#grid li:nth-child({place + 1}) .open")
        assert tab.text_content("#caption").startswith(HOSTILE)
        assert tab.title() == "Search photos"
        assert tab.eval_on_selector_all("img[onerror]", "all => all.length") == 0


def test_a_missing_file_says_so(open_tab: OpenTab, library: Library) -> None:
    with open_tab() as tab:
        place = library.embeddings.names.index("missing.png")
        tab.locator(f"#grid li:nth-child({place + 1})").scroll_into_view_if_needed()
        tab.wait_for_selector(f"#grid li:nth-child({place + 1}).missing")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_widths_and_contrast(open_tab: OpenTab, width: int, scheme: str) -> None:
    for path in ("/", "/?q=an+espresso", "/?like=2"):
        options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        with open_tab(path, **options) as tab:
            page_width, window = tab.evaluate(_WIDTH)
            assert page_width <= window
            assert tab.evaluate(_PALE) == []
            edge = "() => Math.max(...[...document.querySelectorAll('#grid li')]"
            edge += ".map(each => each.getBoundingClientRect().right))"
            assert tab.evaluate(edge) <= width


@pytest.mark.parametrize(
    ("status", "message", "title", "can_retry"),
    [
        (429, "9.0 s of work wait already", "The server is busy", True),
        (503, "the model does not run", "The server is busy", True),
        (413, "a text must have at most 4096 characters", "That cannot be searched for", False),
    ],
)
def test_errors_are_shown(
    open_tab: OpenTab, status: int, message: str, title: str, can_retry: bool
) -> None:
    with open_tab() as tab:
        body = json.dumps({"error": {"message": message}})
        pattern = re.compile("/search")
        tab.route(pattern, lambda route: route.fulfill(status=status, body=body))
        tab.fill("#query", "a cat")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#notice:not([hidden])")
        assert tab.text_content("#notice-title") == title
        assert message in tab.text_content("#notice-text")
        assert tab.is_visible("#retry") == can_retry and names(tab) == []
        tab.unroute(pattern)


def test_a_token_opens_the_page(
    chromium: Any, encoder: ClipEncoder, library: Library, tmp_path: Path
) -> None:
    app = create_app([encoder], Settings(token="correct horse"), library, thumbnails=tmp_path)
    with running(app) as server:
        context = chromium.new_context()
        tab = context.new_page()
        tab.goto(server.url)
        tab.wait_for_selector("#login:not([hidden])")
        assert tab.text_content("#notice-title") == "A token is needed"
        tab.fill("#token", "wrong horse")
        tab.keyboard.press("Enter")
        tab.wait_for_function("() => document.body.textContent.includes('not the token')")
        tab.fill("#token", "correct horse")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#grid img.loaded")
        assert not tab.is_visible("#notice")
        assert tab.evaluate("document.cookie") == ""  # HttpOnly
        context.close()


def test_no_server_and_no_photos(open_tab: OpenTab, encoder: ClipEncoder) -> None:
    with open_tab() as tab:
        pattern = re.compile("/search")
        tab.route(pattern, lambda route: route.abort())
        tab.fill("#query", "a cat")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#notice:not([hidden])")
        assert tab.text_content("#notice-title") == "The server does not answer"
        tab.unroute(pattern)
        tab.click("#retry")
        tab.wait_for_selector("#grid li")
        assert not tab.is_visible("#notice")
        nothing = json.dumps({"results": [], "text_ms": 0, "search_ms": 0})
        tab.route(pattern, lambda route: route.fulfill(body=nothing))
        tab.fill("#query", "")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#notice:not([hidden])")
        assert tab.text_content("#notice-title") == "No photos here"
