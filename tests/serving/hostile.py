"""Requests that mean harm, as bytes for a socket: a seeded endless supply."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO

from PIL import Image


def requests(seed: int = 0) -> Iterator[bytes]:
    """Whole or broken HTTP requests, a different one each time."""
    source = random.Random(seed)
    while True:
        for make in MAKERS:
            yield make(source)


def http(path: str, body: bytes = b"", *, kind: str = "application/json", method: str = "POST",
         length: int | str | None = None, more: str = "") -> bytes:  # fmt: skip
    """One request of HTTP/1.1 that closes its connection."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n"
        f"{more}\r\n"
    )
    return head.encode("latin-1") + body


def _embeddings(value: object, **more: object) -> bytes:
    return http(
        "/v1/embeddings", json.dumps({"model": "lraee-tiny", "input": value, **more}).encode()
    )


def _image(data: bytes) -> bytes:
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return _embeddings(uri, modality="image")


def _multipart(body: bytes, boundary: str = "b") -> bytes:
    return http("/predict", body, kind=f"multipart/form-data; boundary={boundary}")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG with this header and these compressed bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _jpeg(source: random.Random) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 48), tuple(source.randbytes(3))).save(buffer, "JPEG")
    return buffer.getvalue()


def _changed(source: random.Random) -> bytes:
    data = bytearray(_jpeg(source))
    for _ in range(source.randint(1, 60)):
        data[source.randrange(3, len(data))] = source.randrange(256)
    return _image(bytes(data))


def _bomb(source: random.Random) -> bytes:
    side = source.choice((20_000, 65_535, 2**31 - 1))
    return _image(png(side, source.choice((side, 1, 20_000)), zlib.compress(bytes(100_000))))


def _full_bomb(source: random.Random) -> bytes:
    """12,000 x 12,000 pixels that are really there, in some hundred kB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(36_001)) for _ in range(source.randint(500, 1000)))
    return _image(png(12_000, 12_000, rows + packer.flush()))


def _form(source: random.Random) -> bytes:
    entries = source.choice((
        "{}", "[]", "null", "{" * 2000, '{"clip": {}}', '{"clip": []}', '{"clip": {"visual": 1}}',
        '{"clip": {"visual": {"modelName": {"a": 1}}}}', '{"clip": {"visual": {}, "textual": {}}}',
        '{"ocr": {"detection": {"modelName": "x"}}}',
        '{"clip": {"textual": {"modelName": "\\u0000"}}}',
    ))  # fmt: skip
    part = f'--b\r\nContent-Disposition: form-data; name="entries"\r\n\r\n{entries}\r\n--b--\r\n'
    return _multipart(part.encode())


def _bad_form(source: random.Random) -> bytes:
    body = source.choice((
        b"", b"--b", b"--b--", b"--b\r\n\r\n", b"--b\r\nContent-Disposition: x\r\n\r\ny\r\n--b--",
        b"--b\r\n" + b"A" * 20_000, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n\xff\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' * 500,
        b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nx\r\n' * 300 + b"--b--\r\n",
    ))  # fmt: skip
    return _multipart(body, source.choice(("b", "", "b" * 300, '"')))


def _bad_json(source: random.Random) -> bytes:
    body = source.choice((
        b"", b"{", b"[]", b"null", b"nan", b'"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{",
        b'{"model": 1e999}', b"1" * 10_000, b'{"input": "\\ud800"}', b'{"model": "\x00"}',
    ))  # fmt: skip
    return http(source.choice(("/v1/embeddings", "/v1/classify")), body)


def _bad_input(source: random.Random) -> bytes:
    value = source.choice((
        None, 1, True, [], [[]], [1, 2, 3], {}, {"image": 1}, {"image": "", "text": ""}, "", " ",
        "x" * 5000, ["a"] * 300, {"image": "data:,"}, {"image": "data:image/png;base64,%%%"},
        {"image": "http://169.254.169.254/latest/meta-data"}, {"image": "file:///etc/passwd"},
        {"image": "data:image/png,raw"}, {"image": "A"}, {"text": "\ud800"}, {"": ""},
    ))  # fmt: skip
    return _embeddings(value)


def _bad_option(source: random.Random) -> bytes:
    option = source.choice((
        {"model": "../../etc/passwd"}, {"model": None}, {"model": ["lraee-tiny"]}, {"modality": 1},
        {"encoding_format": "pickle"}, {"dimensions": -1}, {"dimensions": 1e300},
        {"dimensions": "256"}, {"modality": "audio"}, {"model": "x" * 100_000},
    ))  # fmt: skip
    return _embeddings("a cat", **option)


def _bad_labels(source: random.Random) -> bytes:
    labels = source.choice((None, [], [""], "x", [1], ["a"] * 2000, [None], {"a": 1}))
    body = {"model": "lraee-tiny", "input": [], "modality": "image", "labels": labels}
    return http("/v1/classify", json.dumps(body).encode())


def _path(source: random.Random) -> bytes:
    path = source.choice((
        "/../../etc/passwd", "/page/../server.py", "/page/%2e%2e%2fserver.py", "/photos/0", "//",
        "/v1/models/..%2f", "/v1/models/%ff", "/v2/models/%0d%0aX:y", "/thumbnails/-1",
        "/?q=%ff", "/%00",
        "/" + "a" * 20_000, "/search?k=-1&like=1e9", "*", "http://evil/",
        "/v1/embeddings?" + "a&" * 5000,
    ))  # fmt: skip
    return http(path, method=source.choice(("GET", "POST", "PUT", "TRACE", "HEAD", "OPTIONS")))


def _framing(source: random.Random) -> bytes:
    """Lengths that lie, both lengths, chunks that are none."""
    more = source.choice((
        "Transfer-Encoding: chunked\r\n", "Transfer-Encoding: x\r\n", "Content-Length: 5\r\n",
        "Expect: 100-continue\r\n", "X: " + "y" * 70_000 + "\r\n", "Upgrade: websocket\r\n",
    ))  # fmt: skip
    length = source.choice((0, 3, 10**6, 10**12, "-1", "1_0", "+5", "", "0x10", "9" * 400))
    return http("/v1/embeddings", b'{"model":', length=length, more=more)


def _noise(source: random.Random) -> bytes:
    return source.choice((
        source.randbytes(source.randint(1, 4000)), b"\r\n" * 50, b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ))  # fmt: skip


def _junk_image(source: random.Random) -> bytes:
    start = source.choice((
        b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"GIF89a", b"BM",
        b"II*\x00", b"MM\x00*", b"P6\n9999999 9999999\n255\n", b"%!PS-Adobe", b"<svg/>", b"",
    ))  # fmt: skip
    return _image(start + source.randbytes(source.randint(0, 3000)))


def _large(source: random.Random) -> bytes:
    """An image beyond the limit, and a body beyond it."""
    if source.random() < 0.5:
        return _image(b"\xff\xd8\xff" + bytes(22 << 20))
    return http("/v1/embeddings", b"{", length=source.choice((40 << 20, 2**40)))


MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    _changed, _bomb, _form, _bad_form, _bad_json, _bad_input, _bad_option, _bad_labels, _path,
    _framing, _noise, _junk_image, _changed, _bad_form, _full_bomb, _bad_input, _framing,
    _junk_image, _large, _bad_json,
)  # fmt: skip
