"""What one server allows: sizes, times, hosts."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lraee.data.decoding import Limits

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_TOKEN_CHARS = 8


@dataclass(frozen=True)
class Settings:
    """Limits of a server; the defaults fit one machine with some GB of memory.

    Args:
      body_bytes: largest request.
      image_bytes: largest image, encoded.
      items: most inputs of one request.
      text_chars: longest text.
      inflight_bytes: bodies of all requests together; what comes beyond gets 429.
      queue_s: seconds of work that may wait; what comes beyond gets 429.
      deadline_s: an input that has not reached the model by then gets 504.
      body_s: a body must have come whole by then, else 408.
      max_batch: images of one call of the model.
      max_wait_s: how long a call waits for images that are still being decoded.
      stall_s: a call that runs longer makes the server unready.
      cpus: cores that it may use; None: those of the process, by affinity and CPU quota.
      decoding: what an image may take, checked before it is decoded.
      url_hosts: hosts (name or name:port) that images may be fetched from; empty: none.
      allowed_hosts: accepted Host headers; empty: all.
      token: what clients must bear, or None.
    """

    body_bytes: int = 32 << 20
    image_bytes: int = 20 << 20
    items: int = 256
    text_chars: int = 4096
    inflight_bytes: int = 256 << 20
    queue_s: float = 10.0
    deadline_s: float = 30.0
    body_s: float = 30.0
    max_batch: int = 32
    max_wait_s: float = 0.005
    stall_s: float = 60.0
    cpus: float | None = None
    decoding: Limits = Limits(max_pixels=64_000_000)
    url_hosts: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)


def read_token(path: Path | None) -> str | None:
    """The token of the file, or of LRAEE_TOKEN, or None. Raises: ValueError on a short one."""
    token = os.environ.get("LRAEE_TOKEN") if path is None else path.read_text().strip()
    if token is not None and len(token) < _TOKEN_CHARS:
        where = "LRAEE_TOKEN" if path is None else str(path)
        raise ValueError(
            f"serve: the token of {where} must have at least {_TOKEN_CHARS} characters,"
            f" got {len(token)}"
        )
    return token
