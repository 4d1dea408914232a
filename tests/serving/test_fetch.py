"""Images by URL: which hosts, which addresses, how much."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from lraee.serving.errors import ServiceError
from lraee.serving.fetch import Fetcher, is_public

PRIVATE = (
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::",
    "2001:0:7f00:1::", "ff02::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {"/missing": 404, "/redirect": 302}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/image")
        self.end_headers()
        self.wfile.write(b"x" * (2000 if self.path == "/large" else 10))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def refusal(fetcher: Fetcher, url: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        fetcher.fetch(url)
    return caught.value


def test_fetches_from_a_listed_host(port: int) -> None:
    fetcher = Fetcher((f"localhost:{port}",), 1000, is_allowed=lambda address: True)
    assert fetcher.fetch(f"http://localhost:{port}/image") == b"x" * 10
    assert refusal(fetcher, f"http://localhost:{port}/large").status == 413
    assert refusal(fetcher, f"http://localhost:{port}/missing").status == 422
    assert "302" in refusal(fetcher, f"http://localhost:{port}/redirect").message


def test_a_listed_name_with_a_private_address_is_refused(port: int) -> None:
    fetcher = Fetcher((f"localhost:{port}",), 1000)
    error = refusal(fetcher, f"http://localhost:{port}/image")
    assert error.status == 400 and "not public" in error.message


@pytest.mark.parametrize(
    "url",
    [
        "http://other/image", "http://localhost/image", "http://user@images.example/", "http://",
        "http://images.example:81/", "http://images.example.evil/", "https://images.example\\@evil/",
        "http://images.example/a b", "http://images.example/\r\nX: y", "http://[::1/", "HTTP://x:y/",
        "http://images.example/ü",
    ],
)  # fmt: skip
def test_urls_that_are_refused_unresolved(url: str) -> None:
    assert refusal(Fetcher(("images.example",), 1000), url).status == 400


def test_off_by_default() -> None:
    assert "not enabled" in refusal(Fetcher((), 1000), "http://images.example/").message
