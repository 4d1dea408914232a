"""Images by URL, from listed hosts only: no redirects, no private addresses, bounded."""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from lraee.serving.errors import ServiceError, bad_request

_TIMEOUT_S = 10.0
_CHUNK_BYTES = 1 << 16
_EMBEDS_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/32", "2002::/16", "2001::/32")))


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, and hides no other address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or any(ip in network for network in _EMBEDS_IPV4):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Fetcher:
    """fetch(url) -> bytes. The address that was checked is the one that is connected to.

    Args:
      hosts: allowed, "name" (the scheme's own port) or "name:port".
      limit_bytes: largest answer.
      is_allowed: which addresses; tests allow loopback.
    """

    def __init__(
        self,
        hosts: tuple[str, ...],
        limit_bytes: int,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        """See the class."""
        self._hosts = frozenset(host.lower() for host in hosts)
        self._limit_bytes, self._is_allowed = limit_bytes, is_allowed

    def fetch(self, url: str) -> bytes:
        """Return the body; blocks. Raises ServiceError 400 or 413, 422 where the host fails."""
        parts, host, port = self._split(url)
        address = self._resolve(host, port)
        deadline = time.monotonic() + _TIMEOUT_S
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = _Connection(host, port, address, is_tls=parts.scheme == "https")
        try:
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "lraee"})
            return self._read(connection.getresponse(), deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceError(
                422, f"the URL could not be fetched: {type(error).__name__}"
            ) from None
        finally:
            connection.close()

    def _split(self, url: str) -> tuple[SplitResult, str, int]:
        if not self._hosts:
            raise bad_request("images by URL are not enabled here; send the image itself")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise bad_request("the URL of an image must be a URL") from None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise bad_request("the URL of an image must be http or https, without a user name")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise bad_request("the URL of an image must be ASCII without spaces")
        if (host if port is None else f"{host}:{port}") not in self._hosts:
            raise bad_request("the host of this URL is not allowed here")
        return parts, host, port or (443 if parts.scheme == "https" else 80)

    def _resolve(self, host: str, port: int) -> str:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise ServiceError(422, "the host of this URL is not known") from None
        addresses = [str(row[4][0]) for row in rows]
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise bad_request("the host of this URL has an address that is not public")
        return addresses[0]

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        if response.status != 200:
            raise ServiceError(
                422, f"the URL answered {response.status}; redirects are not followed"
            )
        data = b""
        while chunk := response.read1(_CHUNK_BYTES):
            data += chunk
            if len(data) > self._limit_bytes:
                raise ServiceError(413, f"an image must have at most {self._limit_bytes} bytes")
            if time.monotonic() > deadline:
                raise ServiceError(422, "the URL took too long")
        return data


class _Connection(http.client.HTTPConnection):
    """Connects to an address that is known already; the host's name is for TLS and its header."""

    def __init__(self, host: str, port: int, address: str, *, is_tls: bool) -> None:
        super().__init__(host, port, timeout=_TIMEOUT_S)
        self.default_port = 443 if is_tls else 80
        self._address, self._is_tls = address, is_tls

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), timeout=_TIMEOUT_S)
        if self._is_tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
